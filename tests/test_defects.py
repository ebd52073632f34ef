"""Each known defect of BentoML's own `bentoml.diffusers`, by its number: none of them is here."""

import subprocess
import sys
from pathlib import Path

import bentoml
import diffusers
import pytest
import torch
import yaml
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import errors, testing
from bentoml_diffusers.adapters import supports_lora

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}


@pytest.fixture
def run(model, run_local, lora_dir):
    return run_local(model, lora_dir=str(lora_dir))


def installed_class(name):
    """A pipeline class of diffusers; None where a package it needs is missing or too old."""
    try:
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
    except RuntimeError:
        return None
    return cls if isinstance(cls, type) and "_backends" not in vars(cls) else None


def test_01_every_class_that_diffusers_gives_lora_takes_it():
    from diffusers.loaders.lora_base import LoraBaseMixin

    classes = [cls for name in dir(diffusers) if (cls := installed_class(name)) is not None]
    with_lora = [cls for cls in classes if hasattr(cls, "load_lora_weights")]
    assert len(with_lora) > 100
    assert all(supports_lora(cls) == issubclass(cls, LoraBaseMixin) for cls in classes)
    assert [cls for cls in with_lora if not supports_lora(cls)] == []


def test_01_static_lora_changes_the_image(model, run_local, lora_dir, pixels):
    plain = run_local(model)
    static = run_local(model, lora_dir=str(lora_dir), lora_weights="one.safetensors")
    assert abs(pixels(plain(**CALL)) - pixels(static(**CALL))).max() > 10


def test_01_lora_of_a_request_changes_the_image(run, pixels):
    plain = pixels(run(**CALL))
    assert abs(pixels(run(**CALL, lora_weights="one.safetensors")) - plain).max() > 10


def test_01_unknown_lora_is_an_error(run):
    with pytest.raises(errors.AdapterNotFound, match=r"one\.safetensors"):
        run(**CALL, lora_weights="on.safetensors")


def test_02_presets_reach_their_own_method(pipeline_folder, name):
    model = bentoml_diffusers.import_model(
        name, pipeline_folder, signatures={"text2img": {}, "img2img": {}}
    ).with_options(
        custom_pipeline="stable_diffusion_mega",
        partial_kwargs={
            "text2img": {"num_inference_steps": 2, "height": 64, "width": 64},
            "img2img": {"num_inference_steps": 7, "strength": 1.0},
        },
    )
    runner = model.to_runner()
    runner.init_local(quiet=True)
    image = runner.text2img.run(prompt="a")[0][0]
    assert image.size == (64, 64)
    other = runner.img2img.run(prompt="a", image=image.resize((32, 32)))[0][0]
    assert other.size == (32, 32)


def test_03_xformers_can_be_asked_for(model, run_local):
    with pytest.raises(errors.InvalidOption, match="enable_xformers"):
        run_local(model, enable_xformers=True)  # there is no GPU: it was really tried


def test_04_mappings_are_not_emptied(run, model, run_local, lora_dir):
    choice = {"model_name": str(lora_dir), "weight_name": "one.safetensors"}
    static = run_local(model, lora_weights=choice)
    static(**CALL)
    request = {"name": "one.safetensors", "scale": 0.5}
    run(**CALL, lora_weights=request)
    run(**CALL, lora_weights=request)
    assert choice == {"model_name": str(lora_dir), "weight_name": "one.safetensors"}
    assert request == {"name": "one.safetensors", "scale": 0.5}


def test_05_messages_name_what_is_missing(name, run_local, lora_dir):
    unconditional = bentoml_diffusers.save_model(name, testing.tiny_ddpm())
    with pytest.raises(NotImplementedError, match="does not support LoRA"):
        run_local(unconditional, lora_dir=str(lora_dir), lora_weights="one.safetensors")
    with pytest.raises(NotImplementedError, match="does not support textual inversion"):
        run_local(unconditional, textual_inversions=str(lora_dir / "one.safetensors"))


def test_06_lora_dir_reaches_load_model(model, lora_dir):
    pipeline = bentoml_diffusers.load_model(
        model, lora_dir=str(lora_dir), lora_weights="one.safetensors"
    )
    assert pipeline.get_active_adapters()


def test_07_static_adapters_survive_requests_and_failures(model, run_local, lora_dir, pixels):
    run = run_local(model, lora_dir=str(lora_dir), lora_weights="one.safetensors")
    before = pixels(run(**CALL))
    both = pixels(run(**CALL, lora_weights="two.safetensors"))
    assert abs(both - before).max() > 10
    assert (pixels(run(**CALL)) == before).all()
    with pytest.raises(errors.AdapterNotFound):
        run(**CALL, lora_weights="three.safetensors")
    assert (pixels(run(**CALL)) == before).all()


def test_08_plain_hub_ids_are_understood(model, lora_dir):
    from bentoml_diffusers.adapters import request_finder

    options = bentoml_diffusers.ModelOptions(adapter_sources=("hub",))
    (plain,) = request_finder(options).find_all("latent-consistency/lcm-lora-sdv1-5")
    assert plain.path == "latent-consistency/lcm-lora-sdv1-5"
    (file,) = request_finder(options).find_all("owner/repository/weights.safetensors")
    assert (file.path, file.arguments["weight_name"]) == ("owner/repository", "weights.safetensors")


def test_09_another_import_under_the_same_name_is_not_the_old_one(tmp_path, name):
    testing.tiny_stable_diffusion(seed=1).save_pretrained(tmp_path / "one")
    testing.tiny_stable_diffusion(seed=2).save_pretrained(tmp_path / "two")
    first = bentoml_diffusers.import_model(name, tmp_path / "one")
    assert bentoml_diffusers.import_model(name, tmp_path / "one").tag == first.tag
    second = bentoml_diffusers.import_model(name, tmp_path / "two")
    assert second.tag != first.tag
    assert bentoml_diffusers.get(name).tag == second.tag
    with pytest.raises(errors.TagConflict):
        bentoml_diffusers.import_model(first.tag, tmp_path / "two")


@pytest.mark.parametrize("text", ["os.system", "this.s", "diffusers.utils.os", "torch.nn.Linear"])
def test_10_free_text_is_no_code(run, model, text):
    with pytest.raises(errors.InvalidRequest, match="scheduler"):
        run(**CALL, scheduler=text)
    with pytest.raises(errors.InvalidOption):
        bentoml_diffusers.load_model(model, pipeline_class=text)


def test_10_a_scheduler_of_one_request_is_of_that_request_only(run, pixels):
    before = pixels(run(**CALL))
    assert (pixels(run(**CALL, scheduler="EulerDiscreteScheduler")) != before).any()
    assert (pixels(run(**CALL)) == before).all()


def test_11_stored_options_are_used(pipeline_folder, name):
    model = bentoml_diffusers.import_model(
        name, pipeline_folder, pipeline_class="StableDiffusionImg2ImgPipeline"
    )
    loaded = bentoml_diffusers.load_model(model.tag)
    assert type(loaded) is diffusers.StableDiffusionImg2ImgPipeline
    over = bentoml_diffusers.load_model(model.tag, pipeline_class="StableDiffusionPipeline")
    assert type(over) is diffusers.StableDiffusionPipeline


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", diffusers.EulerDiscreteScheduler])
def test_11_scheduler_class_as_text_and_as_class(model, scheduler):
    pipeline = bentoml_diffusers.load_model(model, scheduler_class=scheduler)
    assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler


def test_12_no_model_is_said_before_anything_is_written(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.InvalidModel, match=r"model_index\.json"):
        bentoml_diffusers.import_model(name, tmp_path)
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


def test_14_several_loras_with_scales(run, pixels):
    plain, one, two, both, faint = (
        pixels(run(**CALL, lora_weights=choice))
        for choice in (
            None,
            ["one.safetensors"],
            ["two.safetensors"],
            ["one.safetensors", "two.safetensors"],
            [{"name": "one.safetensors", "scale": 0.2}],
        )
    )
    assert (both != one).any()
    assert (both != two).any()
    assert 0 < abs(faint - plain).mean() < abs(one - plain).mean()
    assert (
        pixels(run(**CALL, lora_weights={"name": "one.safetensors", "scale": 0})) == plain
    ).all()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "~/x.safetensors", "https://a/b.safetensors", "a/b/c.bin"],
)
def test_15_requests_reach_no_path_and_no_repository(run, path):
    with pytest.raises(errors.UntrustedSource, match="lora_dir"):
        run(**CALL, lora_weights=path)


def test_15_links_out_of_lora_dir_are_refused(model, run_local, lora_dir, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(lora_dir / "one.safetensors")
    run = run_local(model, lora_dir=str(tmp_path))
    with pytest.raises(errors.UntrustedSource):
        run(**CALL, lora_weights="link.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_16_dtype_as_text(model, dtype):
    pipeline = bentoml_diffusers.load_model(model, torch_dtype=dtype)
    assert pipeline.unet.dtype == torch.float16


def test_17_unknown_arguments_are_errors(run):
    with pytest.raises(errors.InvalidRequest, match=r"guidence_scale.*guidance_scale"):
        run(**CALL, guidence_scale=2)


def test_18_batchable_models_run(pipeline_folder, name, run_local):
    model = bentoml_diffusers.import_model(
        name, pipeline_folder, signatures={"__call__": {"batchable": True}}
    )
    assert run_local(model)(**CALL)[0][0].size == (32, 32)


def test_21_the_returned_model_is_the_stored_one(pipeline_folder, name):
    model = bentoml_diffusers.import_model(name, pipeline_folder)
    path = Path(model.path)
    del model
    assert (path / "diffusion_model" / "model_index.json").is_file()
    assert path == Path(bentoml.models.get(name).path)


def test_23_there_is_one_module():
    import bentoml.diffusers as imported

    assert imported is bentoml_diffusers
    assert bentoml.diffusers is bentoml_diffusers
    assert sys.modules["bentoml.diffusers"] is bentoml_diffusers


def test_24_any_denoiser_can_be_compiled(model, pixels):
    plain = bentoml_diffusers.load_model(model)
    compiled = bentoml_diffusers.load_model(model, enable_torch_compile=True)
    assert compiled.unet._compiled_call_impl is not None
    assert plain.unet._compiled_call_impl is None


def test_26_mega_runs_offline_by_its_name(model, run_local, pixels):
    image = Image.new("RGB", (32, 32), "red")
    mega = {"custom_pipeline": "stable_diffusion_mega"}
    assert run_local(model, **mega)(**CALL)[0][0].size == (32, 32)
    engine = bentoml_diffusers.Engine.from_model(model, **mega)
    with engine:
        same = engine.run("text2img", **CALL).images[0]
        engine.run("img2img", image=image, strength=0.9, **CALL)
        engine.run("inpaint", image=image, mask_image=image, **CALL)
    assert (pixels(same) == pixels(run_local(model)(**CALL))).all()


def test_26_a_signature_that_the_class_lacks_is_said_at_once(pipeline_folder, name):
    signatures = {"text2img": {}, "text2video": {}}
    model = bentoml_diffusers.import_model(name, pipeline_folder, signatures=signatures)
    with pytest.raises(errors.InvalidOption, match="text2video"):
        model.with_options(pipeline_class="StableDiffusionPipeline").to_runner()


def test_26_code_of_others_needs_trust(model, tmp_path):
    (tmp_path / "pipeline.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(errors.UntrustedSource, match="sha256"):
        bentoml_diffusers.load_model(model, custom_pipeline=str(tmp_path))


def test_27_textual_inversion_is_found_below_lora_dir(model, tmp_path, pixels):
    from safetensors.torch import save_file

    save_file({"<word>": torch.randn(1, 16)}, tmp_path / "word.safetensors")
    pipeline = bentoml_diffusers.load_model(
        model, lora_dir=str(tmp_path), textual_inversions="word.safetensors"
    )
    assert "<word>" in pipeline.tokenizer.get_vocab()


@pytest.mark.slow
def test_models_of_bentomls_own_module_load_and_run(pipeline_folder, name):
    """Stored by BentoML's module, in a process without ours; loaded and run by ours."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import bentoml\n"
        f"bentoml.diffusers.import_model({name!r}, {str(pipeline_folder)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    model = bentoml_diffusers.get(name)
    stored = yaml.safe_load((Path(model.path) / "model.yaml").read_text())
    assert stored["module"] == "bentoml.diffusers"
    runner = model.to_runner()
    runner.init_local(quiet=True)
    assert runner.run(**CALL)[0][0].size == (32, 32)
