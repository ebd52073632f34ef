"""Modular pipelines in the store and at load: nothing lost, nothing elsewhere, nothing unsaid."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bentoml
import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import SequentialPipelineBlocks
from modular_models import BLOCK, IMAGE, INVERT, entry, generate, rewrite, write_blocks
from safetensors.torch import load_file

import bentoml_diffusers
from bentoml_diffusers import errors, store, testing


def index_of(model):
    return json.loads(
        Path(model.path_of("diffusion_model"), "modular_model_index.json").read_text()
    )


def record_of(model):
    return store.read_record(Path(model.path))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A tiny modular SDXL, saved by diffusers. Not to be written to."""
    folder = tmp_path_factory.mktemp("modular") / "repository"
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture
def copied(repository, tmp_path):
    """A copy of it that may be written to; its index still names the old place."""
    return Path(shutil.copytree(repository, tmp_path / "copied"))


@pytest.fixture
def with_code(copied):
    """Puts the code of blocks into the copy."""

    def run(word="ours"):
        write_blocks(copied, word)
        rewrite(copied / "modular_model_index.json", _blocks_class_name="Ours")
        return copied

    return run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Imports Python code as a module of its own file."""

    def run(code, name="blocks_of_a_test", **helpers):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in {"__init__": "", "block": code, **helpers}.items():
            (folder / f"{file}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        for known in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
        return importlib.import_module(f"{name}.block")

    return run


# From a classic folder


def test_a_classic_folder_generates_the_same_as_a_modular_pipeline(modular_model, sdxl_pixels):
    pipeline = bentoml_diffusers.load_model(modular_model)
    assert type(pipeline) is diffusers.StableDiffusionXLModularPipeline
    assert (generate(pipeline) == sdxl_pixels).all()
    record = record_of(modular_model)
    assert record.kind == "pipeline"
    assert record.class_name == "StableDiffusionXLModularPipeline"
    assert record.details["blocks"] == "StableDiffusionXLAutoBlocks"
    assert record.details["modular_workflows"] == ["text2image", "image2image", "inpainting"]
    assert record.components["unet"] == "diffusers.UNet2DConditionModel"
    assert store.verify(modular_model).is_intact


def test_the_stored_index_names_nothing_outside(modular_model, sdxl_folder):
    text = json.dumps(index_of(modular_model))
    assert str(sdxl_folder.parent) not in text
    for value in index_of(modular_model).values():
        if isinstance(value, list):
            assert value[2]["pretrained_model_name_or_path"] is None
            assert value[2]["revision"] is None
    assert not Path(modular_model.path_of("diffusion_model"), "model_index.json").exists()


def test_the_same_import_again_is_the_same_model(modular_model, sdxl_folder):
    again = bentoml_diffusers.import_model(
        modular_model.tag.name, sdxl_folder, pipeline_class="ModularPipeline"
    )
    assert again.tag == modular_model.tag
    other = bentoml_diffusers.import_model(modular_model.tag.name, sdxl_folder)
    assert other.tag != modular_model.tag
    assert type(bentoml_diffusers.load_model(other)) is diffusers.StableDiffusionXLPipeline


def test_a_classic_model_of_the_store_loads_as_a_modular_one(sdxl_folder, sdxl_pixels, name):
    model = bentoml_diffusers.import_model(name, sdxl_folder)
    pipeline = bentoml_diffusers.load_model(model, pipeline_class="ModularPipeline")
    assert (generate(pipeline) == sdxl_pixels).all()


def test_a_class_without_blocks_is_refused(pipeline_folder, name):
    with pytest.raises(errors.InvalidModel, match="no modular pipeline"):
        bentoml_diffusers.import_model(name, pipeline_folder, pipeline_class="ModularPipeline")


def test_null_entries_of_a_classic_index_do_not_hide_what_is_made_from_a_config(
    sdxl_folder, tmp_path, name
):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "null"))
    rewrite(folder / "model_index.json", feature_extractor=[None, None], image_encoder=[None, None])
    model = bentoml_diffusers.import_model(name, folder, pipeline_class="ModularPipeline")
    pipeline = bentoml_diffusers.load_model(model)
    assert callable(pipeline.feature_extractor)


# From a modular folder


def test_a_moved_folder_is_imported_whole(copied, sdxl_pixels, name):
    index = json.loads((copied / "modular_model_index.json").read_text())
    assert index["unet"][2]["pretrained_model_name_or_path"] != str(copied)  # the old place
    model = bentoml_diffusers.import_model(name, copied)
    assert (generate(bentoml_diffusers.load_model(model)) == sdxl_pixels).all()
    assert str(copied.parent) not in json.dumps(index_of(model))
    assert bentoml_diffusers.import_model(name, copied).tag == model.tag
    shutil.rmtree(copied)
    assert (generate(bentoml_diffusers.load_model(model)) == sdxl_pixels).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "no files for 'vae'"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "weights.*'vae'"),
        (
            lambda f: rewrite(
                f / "modular_model_index.json",
                controlnet=entry("diffusers", "ControlNetModel", "owner/hub-id", "controlnet"),
            ),
            "'controlnet'.*'owner/hub-id'",
        ),
        (
            lambda f: (
                rewrite(
                    f / "modular_model_index.json", unet=entry("diffusers", "UNet2DConditionModel")
                )
                or shutil.rmtree(f / "unet")
            ),
            "lacks unet",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", vae=entry("os", "system", "x", "vae")
            ),
            r"os\.system",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json",
                controlnet=entry("diffusers", "AutoencoderKL", "a/b", "../vae"),
            ),
            "outside",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", vae=["diffusers", "AutoencoderKL", 3]
            ),
            "'vae'",
        ),
        (
            lambda f: rewrite(f / "modular_model_index.json", _class_name="DiffusionPipeline"),
            "no modular pipeline",
        ),
        (lambda f: (f / "modular_model_index.json").write_text("{"), "modular_model_index.json"),
        (lambda f: (f / "vae" / "modeling.py").write_text("raise SystemExit"), "vae/modeling.py"),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", _blocks_class_name="SequentialPipelineBlocks"
            ),
            "from_blocks_dict",
        ),
    ],
)
def test_a_folder_that_would_not_be_whole_is_refused_now(copied, name, change, words):
    change(copied)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, copied)
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


def test_what_fails_to_load_is_an_error_and_not_none(copied, name):
    model = bentoml_diffusers.import_model(name, copied)
    path = Path(model.path_of("diffusion_model"), "vae", "config.json")
    rewrite(path, latent_channels=5)
    with pytest.raises(errors.InvalidModel, match="vae"):
        bentoml_diffusers.load_model(model)
    shutil.rmtree(path.parent)
    with pytest.raises(errors.InvalidModel, match="vae"):
        bentoml_diffusers.load_model(model)


def test_variants_are_taken_and_loaded(copied, name):
    unet = testing.tiny_stable_diffusion_xl(seed=3).unet
    unet.save_pretrained(copied / "unet", variant="fp16")
    model = bentoml_diffusers.import_model(name, copied, variant="fp16")
    assert index_of(model)["unet"][2]["variant"] == "fp16"
    assert index_of(model)["vae"][2]["variant"] is None
    loaded = bentoml_diffusers.load_model(model).unet
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)
    with pytest.raises(errors.InvalidModel, match="int4"):
        bentoml_diffusers.import_model(f"{name}-int4", copied, variant="int4")


def test_a_classic_class_for_a_modular_source_is_refused(copied, name):
    with pytest.raises(errors.InvalidOption, match="pipeline_class"):
        bentoml_diffusers.import_model(name, copied, pipeline_class="StableDiffusionXLPipeline")


def test_an_index_that_was_changed_in_the_store_reaches_no_hub(copied, name):
    model = bentoml_diffusers.import_model(name, copied)
    index = Path(model.path_of("diffusion_model"), "modular_model_index.json")
    vae = entry("diffusers", "AutoencoderKL", "owner/name", "vae")
    rewrite(index, vae=vae, controlnet=entry("diffusers", "ControlNetModel", "owner/name", "x"))
    assert store.verify(model).changed == ("modular_model_index.json",)
    with pytest.raises(errors.InvalidModel, match="lacks the folder of 'controlnet'"):
        bentoml_diffusers.load_model(model)
    rewrite(index, controlnet=None)
    assert bentoml_diffusers.load_model(model).vae is not None  # what is in the entry


def test_pickles_become_safetensors(copied, name):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(errors.UntrustedSource, match="unet"):
        bentoml_diffusers.import_model(name, copied)
    model = bentoml_diffusers.import_model(name, copied, allow_pickle=True)
    assert Path(model.path_of("diffusion_model"), "unet", weights.name).is_file()
    assert bentoml_diffusers.import_model(name, copied, allow_pickle=True).tag == model.tag
    bentoml_diffusers.load_model(model)


def test_values_of_the_config_are_kept(copied, name):
    index = copied / "modular_model_index.json"
    rewrite(index, force_zeros_for_empty_prompt=False, sample_sigmas=[1.0, 0.5, 0.25])
    model = bentoml_diffusers.import_model(name, copied)
    assert index_of(model)["sample_sigmas"] == [1.0, 0.5, 0.25]
    loaded = bentoml_diffusers.load_model(model)
    assert loaded.config.force_zeros_for_empty_prompt is False
    again = bentoml_diffusers.save_model(f"{name}-again", loaded)
    assert bentoml_diffusers.load_model(again).config.force_zeros_for_empty_prompt is False


# Code of blocks


def test_code_is_stored_and_runs_only_when_trusted(with_code, name):
    model = bentoml_diffusers.import_model(name, with_code(f"only {name}"))
    code = record_of(model).code
    assert (code.entry, code.class_name) == ("block.py", "Ours")
    assert sorted(os.listdir(Path(model.path, "code"))) == ["block.py", "helper.py"]
    with pytest.raises(errors.UntrustedSource, match=code.sha256):
        bentoml_diffusers.load_model(model)
    trusted = bentoml_diffusers.load_model(model, trust_remote_code=True)
    assert trusted.blocks.word == f"only {name}"
    assert type(trusted.blocks).__module__.startswith("_bentoml_diffusers_code_")
    rewritten = Path(model.path, "code", "helper.py")
    rewritten.write_text("WORD = 'evil'")
    with pytest.raises(errors.InvalidModel, match="code that was changed"):
        bentoml_diffusers.load_model(model, trust_remote_code=True)


def test_two_models_with_a_block_py_each_never_mix(with_code, name, sdxl_pixels):
    loaded = []
    for word in ("one", "two"):
        model = bentoml_diffusers.import_model(
            f"{name}-{word}", with_code(f"{name} {word}"), trust_remote_code=True
        )
        loaded.append(bentoml_diffusers.load_model(model))
    assert [pipeline.blocks.word for pipeline in loaded] == [f"{name} one", f"{name} two"]
    assert (generate(loaded[0]) == sdxl_pixels).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "block.py").unlink(), "lacks block.py"),
        (lambda f: (f / "helper.py").unlink(), "helper, which is not in its folder"),
        (lambda f: (f / "block.py").write_text("import helper"), "from .helper import"),
        (lambda f: (f / "block.py").write_text("from ..up import x"), "one folder"),
        (lambda f: (f / "block.py").write_text("class ("), "not a Python file"),
        (
            lambda f: rewrite(
                f / "modular_config.json", auto_map={"ModularPipelineBlocks": "__main__.Ours"}
            ),
            "__main__.Ours",
        ),
    ],
)
def test_code_that_could_not_run_is_refused_now(with_code, name, change, words):
    folder = with_code()
    change(folder)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, folder)


def test_blocks_alone_need_a_pipeline(with_code, sdxl_folder, tmp_path, name, sdxl_pixels):
    folder = with_code(f"alone {name}")
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    for file in ("block.py", "helper.py", "modular_config.json"):
        shutil.copy(folder / file, blocks)
    with pytest.raises(errors.InvalidModel, match="custom_pipeline"):
        bentoml_diffusers.import_model(name, blocks)
    model = bentoml_diffusers.import_model(
        name, sdxl_folder, custom_pipeline=str(blocks), trust_remote_code=True
    )
    pipeline = bentoml_diffusers.load_model(model)
    assert pipeline.blocks.word == f"alone {name}"
    assert (generate(pipeline) == sdxl_pixels).all()


# From memory


@pytest.mark.slow
def test_everything_of_a_pipeline_travels_to_another_store(module, tmp_path, name):
    """Own blocks, guider, ControlNet, IP-Adapter and scale: in a new process, elsewhere."""
    blocks = module(BLOCK, helper="WORD = 'travelled'").Ours()
    pipeline = testing.tiny_modular_stable_diffusion_xl(
        blocks=blocks, controlnet=True, image_encoder=True
    )
    pipeline.update_components(guider=pipeline.guider.new(guidance_scale=4.0))
    adapter = testing.save_tiny_ip_adapter(tmp_path / "ip")
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    pipeline.set_ip_adapter_scale(0.6)
    before = generate(pipeline, ip_adapter_image=IMAGE, control_image=IMAGE)
    spec = dict(pipeline.config["unet"][2])
    model = bentoml_diffusers.save_model(name, pipeline)
    assert pipeline.config["unet"][2] == spec  # diffusers would write the place it saves to
    assert (generate(pipeline, ip_adapter_image=IMAGE, control_image=IMAGE) == before).all()
    archive = bentoml.models.export_model(str(model.tag), str(tmp_path / "x.bentomodel"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import bentoml, bentoml_diffusers, json
from modular_models import IMAGE, generate
bentoml.models.import_model({archive!r})
try:
    bentoml_diffusers.load_model({str(model.tag)!r})
except bentoml_diffusers.errors.UntrustedSource:
    pass
pipeline = bentoml_diffusers.load_model({str(model.tag)!r}, trust_remote_code=True)
image = generate(pipeline, ip_adapter_image=IMAGE, control_image=IMAGE)
found = [pipeline.blocks.word, pipeline.guider.guidance_scale, pipeline.null_component_names]
print(json.dumps([found, image.tolist()]))
"""
    other = {"BENTOML_HOME": str(tmp_path / "other"), "HF_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **other},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, image = json.loads(done.stdout.splitlines()[-1])
    assert found == ["travelled", 4.0, []]
    assert (np.asarray(image) == before).all()
    assert not (tmp_path / "none" / "modules").exists()


def test_blocks_put_together_from_parts_come_back_as_they_are(module, name, sdxl_pixels):
    parts = StableDiffusionXLAutoBlocks().get_workflow("text2image").sub_blocks
    own = module(INVERT).Invert
    blocks = SequentialPipelineBlocks.from_blocks_dict({**parts, "invert": own})
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    assert (generate(pipeline) == 255 - sdxl_pixels).all()
    model = bentoml_diffusers.save_model(name, pipeline)
    assert os.listdir(Path(model.path, "code")) == ["block.py"]
    loaded = bentoml_diffusers.load_model(model)
    assert list(loaded.blocks.sub_blocks) == [*parts, "invert"]
    assert (generate(loaded) == 255 - sdxl_pixels).all()


@pytest.mark.parametrize("file", ["../diffusion_model/evil.py", "/tmp/evil.py", 3])
def test_blocks_name_no_file_outside_of_the_trusted_code(module, name, file):
    """`blocks.json` is not part of the code that was trusted."""
    blocks = SequentialPipelineBlocks.from_blocks_dict({"invert": module(INVERT).Invert()})
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    model = bentoml_diffusers.save_model(name, pipeline)
    (found,) = Path(model.path).rglob("blocks.json")
    Path(found.parent, "evil.py").write_text("raise SystemExit('ran')")
    text = found.read_text()
    found.chmod(0o644)
    found.write_text(text.replace('"block.py"', json.dumps(file)))
    assert found.read_text() != text
    with pytest.raises(errors.InvalidModel):
        bentoml_diffusers.load_model(name)


def test_parts_of_a_larger_pipeline_come_back_as_they_are(name, sdxl_pixels):
    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image")
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.blocks) is SequentialPipelineBlocks
    assert list(loaded.blocks.sub_blocks) == list(blocks.sub_blocks)
    assert (generate(loaded) == sdxl_pixels).all()


def test_a_block_inserted_into_blocks_of_diffusers_is_kept(module, name, sdxl_pixels):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.insert("invert", module(INVERT).Invert(), len(blocks.sub_blocks))
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.blocks) is StableDiffusionXLAutoBlocks
    assert (generate(loaded) == 255 - sdxl_pixels).all()
    part = bentoml_diffusers.load_model(name, modular_workflow="text2image")
    assert (generate(part) == 255 - sdxl_pixels).all()


def with_state(module):
    return SequentialPipelineBlocks.from_blocks_dict({"invert": module(INVERT).Invert(by=3)})


def in_main(module, monkeypatch):
    own = module(INVERT).Invert
    monkeypatch.setattr(own, "__module__", "__main__")
    return SequentialPipelineBlocks.from_blocks_dict({"invert": own})


def loaded_twice(module):
    first = module(INVERT).Invert
    importlib.reload(sys.modules[first.__module__])
    return SequentialPipelineBlocks.from_blocks_dict({"invert": first})


def with_arguments(module):
    block = module(INVERT.replace("by=255", "by")).Invert(255)
    return SequentialPipelineBlocks.from_blocks_dict({"invert": block})


def from_two_folders(module):
    one, two = module(INVERT, "one_folder").Invert, module(INVERT, "two_folder").Invert
    return SequentialPipelineBlocks.from_blocks_dict({"one": one, "two": two})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_state, "attributes were changed: by"),
        (in_main, "__main__"),
        (loaded_twice, "any more"),
        (with_arguments, "needs arguments"),
        (from_two_folders, "2 folders"),
    ],
)
def test_blocks_that_would_come_back_otherwise_are_refused(
    module, monkeypatch, request, name, make, words
):
    more = {"monkeypatch": monkeypatch} if make is in_main else {}
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=make(module, **more))
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.save_model(name, pipeline)


def test_components_that_are_missing_are_named(name):
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(vae=None)
    with pytest.raises(errors.InvalidModel, match="lacks vae"):
        bentoml_diffusers.save_model(name, pipeline)
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(text_encoder=None, tokenizer=None)  # its blocks can do without
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert loaded.text_encoder is None


def test_what_is_made_from_a_config_keeps_it(name):
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(
        guider=diffusers.PerturbedAttentionGuidance(
            guidance_scale=3.0, perturbed_guidance_layers=[0]
        ),
        image_processor=diffusers.image_processor.VaeImageProcessor(do_normalize=False),
    )
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.guider) is diffusers.PerturbedAttentionGuidance
    assert loaded.guider.guidance_scale == 3.0
    ours, theirs = dict(loaded.guider.config), dict(pipeline.guider.config)
    assert {**ours, "_use_default_values": 0} == {**theirs, "_use_default_values": 0}
    assert loaded.image_processor.config.do_normalize is False
    again = bentoml_diffusers.load_model(bentoml_diffusers.save_model(f"{name}-2", loaded))
    assert again.image_processor.config.do_normalize is False


@pytest.mark.parametrize("build", ["tiny_modular_stable_diffusion_xl", "tiny_stable_diffusion_xl"])
def test_loaded_loras_are_refused_by_name(build, name):
    from peft import LoraConfig

    pipeline = getattr(testing, build)()
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="watercolour")
    with pytest.raises(errors.InvalidModel, match=r"unet: watercolour.*unload_lora_weights"):
        bentoml_diffusers.save_model(name, pipeline)
