import json
import os
import shutil
from pathlib import Path

import bentoml
import pytest
import torch
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import errors, store, testing
from bentoml_diffusers.store.entries import FORMAT_VERSION


def test_what_is_stored_comes_back(name, pixels):
    pipeline = testing.tiny_stable_diffusion(seed=3)
    model = bentoml_diffusers.save_model(
        name, pipeline, labels={"stage": "dev"}, metadata={"a": 1}, custom_objects={"x": [1, 2]}
    )
    loaded = bentoml_diffusers.load_model(name)
    for part in ("unet", "vae", "text_encoder"):
        stored = getattr(loaded, part).state_dict()
        for key, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(stored[key], value)
    again = bentoml_diffusers.get(f"{name}:latest")
    assert (again.tag, again.info.labels, again.info.metadata) == (
        model.tag,
        {"stage": "dev"},
        {"a": 1},
    )
    assert again.custom_objects == {"x": [1, 2]}
    assert again.info.module == bentoml_diffusers.MODULE_NAME
    assert again.load_model().unet is not None


def test_the_record_says_where_a_model_is_from(model, pipeline_folder):
    record = store.read_record(Path(model.path))
    assert record.kind == "pipeline"
    assert record.class_name == "StableDiffusionPipeline"
    assert record.format_version == FORMAT_VERSION
    assert record.versions["diffusers"]
    assert record.files == {
        path: store.hash_file(Path(model.path, "diffusion_model", path)) for path in record.files
    }
    assert "unet/diffusion_pytorch_model.safetensors" in record.files


def test_a_model_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(errors.InvalidModel, match="upgrade"):
        store.read_record(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_records_of_every_format_are_read(version):
    """What that format wrote; every later version must read it."""
    folder = Path(__file__).parent / "formats" / str(version)
    record = store.read_record(folder)
    assert (record.kind, record.commit, record.variant) == ("pipeline", "abc", "fp16")
    assert record.format_version == version
    assert (record.code is None) == (version == 1)


def test_a_broken_record_is_one_clear_error(tmp_path):
    (tmp_path / "record.json").write_text('{"format_version": 2, "kind": "pipeline", "new": 1}')
    with pytest.raises(errors.InvalidModel, match=r"broken record\.json"):
        store.read_record(tmp_path)


def test_later_changes_of_the_source_do_not_reach_the_store(tmp_path, name):
    testing.tiny_stable_diffusion().save_pretrained(tmp_path)
    model = bentoml_diffusers.import_model(name, tmp_path)
    before = store.read_record(Path(model.path)).files
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert store.entries.hash_files(Path(model.path, "diffusion_model")) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "broken"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "vae").rename(folder / "vea"), "vae"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, name, damage, words):
    testing.tiny_stable_diffusion().save_pretrained(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, tmp_path / "p")
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_repository(name, path):
    with pytest.raises(errors.ModelNotFound, match="not a folder"):
        bentoml_diffusers.import_model(name, path)


@pytest.mark.parametrize("call", ["import_model", "import_lora", "import_textual_inversion"])
def test_a_mistyped_path_is_not_asked_for_at_the_hub(call, name, tmp_path, monkeypatch):
    (tmp_path / "models" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ModelNotFound, match="folder; check the path"):
        getattr(bentoml_diffusers, call)(name, "models/sdxl")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the rights of another user")
def test_a_store_that_is_read_only_is_one_clear_error(name):
    home, pipeline = Path(os.environ["BENTOML_HOME"]), testing.tiny_ddpm()
    home.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(errors.StoreNotWritable, match="cannot be written: Permission denied"):
            bentoml_diffusers.save_model(name, pipeline)
    finally:
        os.seteuid(0)
        home.chmod(0o700)


def test_an_entry_of_the_old_module_is_the_same_model(pipeline_folder, sdxl_folder, name):
    with bentoml.models.create(
        name, module="bentoml.diffusers", signatures={"__call__": {"batchable": False}}
    ) as old:
        shutil.copytree(pipeline_folder, Path(old.path, "diffusion_model"))
    assert bentoml_diffusers.import_model(name, pipeline_folder).tag == old.tag
    asked_otherwise = {"options": {"torch_dtype": "float16"}}
    other = bentoml_diffusers.import_model(name, pipeline_folder, **asked_otherwise)
    assert other.tag != old.tag
    with pytest.raises(errors.TagConflict):
        bentoml_diffusers.import_model(old.tag, sdxl_folder)


def test_the_hub_is_not_reached_offline(name):
    with pytest.raises(errors.ModelNotFound, match="network"):
        bentoml_diffusers.import_model(name, "owner/repository")


def test_a_name_that_is_nowhere_gets_a_hint(model):
    with pytest.raises(errors.ModelNotFound, match="tiny") as caught:
        bentoml_diffusers.get("tinny")
    assert caught.value.error_code == 404
    assert isinstance(caught.value, bentoml.exceptions.NotFound)


def test_models_of_other_frameworks_are_refused(name):
    with bentoml.models.create(name, module="sklearn"):
        pass
    with pytest.raises(errors.ModelNotFound, match="sklearn"):
        bentoml_diffusers.get(name)


@pytest.mark.parametrize("tag", ["not a tag", "a:b:c", "-x"])
def test_a_bad_tag_is_one_clear_error(pipeline_folder, tag):
    with pytest.raises(errors.InvalidModel):
        bentoml_diffusers.import_model(tag, pipeline_folder)


def test_a_full_tag_is_taken_once(name):
    pipeline = testing.tiny_stable_diffusion()
    bentoml_diffusers.save_model(f"{name}:v1", pipeline)
    with pytest.raises(errors.TagConflict) as caught:
        bentoml_diffusers.save_model(f"{name}:v1", pipeline)
    assert caught.value.error_code == 409
    bentoml_diffusers.save_model(f"{name}:v2", pipeline)
    assert bentoml_diffusers.get(name).tag.version == "v2"


def test_saving_something_else_is_refused(name):
    with pytest.raises(errors.InvalidModel, match="DiffusionPipeline"):
        bentoml_diffusers.save_model(name, torch.nn.Linear(1, 1))


def test_a_failing_save_leaves_nothing(name, monkeypatch):
    pipeline = testing.tiny_stable_diffusion()

    def fail(folder, **arguments):
        Path(folder).mkdir()
        Path(folder, "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "save_pretrained", fail)
    with pytest.raises(errors.StorageFull, match="space"):
        bentoml_diffusers.save_model(name, pipeline)
    assert_nothing_is_left(name)


def assert_nothing_is_left(name):
    home = Path(os.environ["BENTOML_HOME"])
    assert not (home / "models" / name).exists()
    assert not [path for path in (home / "diffusers_staging").iterdir() if path.is_dir()]


def test_a_lora_is_stored_by_name(name, lora_dir, model, run_local, pixels):
    entry = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")
    assert bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors").tag == entry.tag
    record = store.read_record(Path(entry.path))
    assert (record.kind, record.details["rank"]) == ("lora", 4)
    run = run_local(model, lora_dir=str(lora_dir))
    call = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
    by_tag = pixels(run(**call, lora_weights=f"{name}:latest"))
    by_file = pixels(run(**call, lora_weights="one.safetensors"))
    assert (by_tag == by_file).all()
    assert (pixels(run(**call, lora_weights=name)) == by_file).all()
    with pytest.raises(errors.InvalidModel, match="is a lora"):
        bentoml_diffusers.load_model(name)


def test_a_textual_inversion_is_stored_by_name(name, tmp_path, model):
    save_file({"<word>": torch.randn(2, 16)}, tmp_path / "word.safetensors")
    bentoml_diffusers.import_textual_inversion(name, tmp_path / "word.safetensors")
    pipeline = bentoml_diffusers.load_model(model, textual_inversions=name)
    assert {"<word>", "<word>_1"} <= set(pipeline.tokenizer.get_vocab())


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("x.safetensors", b"broken", "broken"),
        ("x.txt", b"text", "not a .safetensors file"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, name, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_lora(name, tmp_path / file)


def test_weights_without_lora_are_refused(tmp_path, name):
    save_file({"weight": torch.ones(2, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(errors.InvalidModel, match="holds no LoRA"):
        bentoml_diffusers.import_lora(name, tmp_path / "x.safetensors")
    with pytest.raises(errors.InvalidModel, match="textual inversion"):
        bentoml_diffusers.import_textual_inversion(name, tmp_path / "x.safetensors")
