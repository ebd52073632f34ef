"""Single-file checkpoints, offline; and pickles, which are refused unless allowed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from original import save_checkpoint
from safetensors.torch import load_file, save_file

import bentoml_diffusers
from bentoml_diffusers import errors, store, testing

CALL = {"prompt": "a red circle", "num_inference_steps": 2}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Stable Diffusion as one file, and the pipeline it was made from."""
    path = tmp_path_factory.mktemp("single") / "community.safetensors"
    pipeline = testing.tiny_stable_diffusion(seed=5)
    save_checkpoint(pipeline, path)
    return path, pipeline


def test_a_single_file_becomes_the_pipeline_it_was(checkpoint, pipeline_folder, name, pixels):
    """The folder has other weights: only its configs and tokenizer are taken."""
    path, pipeline = checkpoint
    model = bentoml_diffusers.import_model(name, path, config=pipeline_folder)
    loaded = bentoml_diffusers.load_model(model)
    for part in ("unet", "vae", "text_encoder"):
        stored = getattr(loaded, part).state_dict()
        for key, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(stored[key], value), (part, key)
    images = [
        pixels(item(**CALL, generator=torch.Generator().manual_seed(1)).images[0])
        for item in (loaded, pipeline)
    ]
    assert (images[0] == images[1]).all()
    record = store.read_record(Path(model.path))
    assert (record.origin, record.class_name) == (
        "file community.safetensors",
        "StableDiffusionPipeline",
    )
    assert store.verify(model).is_intact


def test_the_configs_can_be_those_of_a_stored_model(checkpoint, model, name):
    entry = bentoml_diffusers.import_model(name, checkpoint[0], config=str(model.tag))
    again = bentoml_diffusers.import_model(name, checkpoint[0], config=str(model.tag))
    assert again.tag == entry.tag


def test_an_xl_in_half_precision_stays_in_it(tmp_path, name, pixels):
    pipeline = tiny.build("sdxl")
    pipeline.save_pretrained(tmp_path / "config")
    for file in (tmp_path / "config").rglob("*.safetensors"):
        file.unlink()
    save_checkpoint(pipeline, tmp_path / "xl.safetensors", torch.float16)
    model = bentoml_diffusers.import_model(
        name, tmp_path / "xl.safetensors", config=tmp_path / "config"
    )
    weights = Path(model.path, "diffusion_model", "unet", "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    loaded = bentoml_diffusers.load_model(model)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    made = pixels(loaded(**CALL, **SIZE, generator=generators[0]).images[0])
    meant = pixels(pipeline(**CALL, **SIZE, generator=generators[1]).images[0])
    assert abs(made - meant).mean() < 3  # weights rounded to half precision
    for key, value in pipeline.text_encoder_2.state_dict().items():
        assert torch.equal(loaded.text_encoder_2.state_dict()[key], value.half().float())


@pytest.mark.parametrize(
    ("tensors", "file", "error", "words"),
    [
        ({"unet.to_q.lora_A.weight": (1, 1)}, "x.safetensors", errors.InvalidModel, "import_lora"),
        (
            {"weight": (1, 1)},
            "x.safetensors",
            errors.InvalidModel,
            "not a checkpoint of a complete",
        ),
        ({"weight": (1, 1)}, "x.ckpt", errors.UntrustedSource, "allow_pickle"),
        ({"weight": (1, 1)}, "x.gguf", errors.InvalidModel, "not a .safetensors"),
        (
            {"model.diffusion_model.x": (1, 1)},
            "x.safetensors",
            errors.InvalidModel,
            "could not be read",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path, name, pipeline_folder, tensors, file, error, words
):
    path = tmp_path / file
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(error, match=words):
        bentoml_diffusers.import_model(name, path, config=pipeline_folder)
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, name):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(checkpoint[0].read_bytes()[:-10])
    with pytest.raises(errors.InvalidModel, match="truncated"):
        bentoml_diffusers.import_model(name, path)


def test_configs_are_asked_for_where_there_are_none(checkpoint, name):
    with pytest.raises(errors.InvalidModel, match="config="):
        bentoml_diffusers.import_model(name, checkpoint[0])
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.import_model(name, checkpoint[0], config="no-such-model")


def test_configs_are_for_single_files(pipeline_folder, name):
    with pytest.raises(errors.InvalidOption, match="config"):
        bentoml_diffusers.import_model(name, pipeline_folder, config=pipeline_folder)


@pytest.fixture
def pickled(pipeline_folder, tmp_path):
    """The tiny pipeline with pickled weights, one of them in shards."""
    folder = tmp_path / "pickled"
    shutil.copytree(pipeline_folder, folder)
    for path in list(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        path.unlink()
        if path.parent.name == "vae":
            torch.save(tensors, path.with_suffix(".bin"))
        elif path.parent.name == "unet":
            torch.save({"state_dict": tensors}, path.with_suffix(".bin"))
        else:
            write_shards(path.parent, tensors)
    return folder


def write_shards(folder, tensors):
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, folder / file)
        weight_map.update(dict.fromkeys(half, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_pickles_are_refused_with_the_reason(pickled, name):
    with pytest.raises(errors.UntrustedSource, match=r"can run code.*allow_pickle=True"):
        bentoml_diffusers.import_model(name, pickled)


def test_allowed_pickles_are_stored_as_safetensors(pickled, pipeline_folder, name):
    model = bentoml_diffusers.import_model(name, pickled, allow_pickle=True)
    folder = Path(model.path, "diffusion_model")
    assert not list(folder.rglob("*.bin"))
    assert sorted(path.name for path in (folder / "text_encoder").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    loaded = bentoml_diffusers.load_model(model)
    same = bentoml_diffusers.load_model(
        bentoml_diffusers.import_model(f"{name}-plain", pipeline_folder)
    )
    for part in ("unet", "vae", "text_encoder"):
        for key, value in getattr(same, part).state_dict().items():
            assert torch.equal(getattr(loaded, part).state_dict()[key], value)
    assert bentoml_diffusers.import_model(name, pickled, allow_pickle=True).tag == model.tag


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_with_more_than_tensors_is_refused_all_the_same(pickled, name, capsys):
    torch.save({"weight": torch.ones(1), "evil": Evil()}, pickled / "vae" / "evil")
    (pickled / "vae" / "evil").rename(pickled / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(errors.InvalidModel, match="tensors only"):
        bentoml_diffusers.import_model(name, pickled, allow_pickle=True)
    assert "it ran" not in capsys.readouterr().out
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


def test_a_checkpoint_as_pickle_is_read_when_allowed(checkpoint, tmp_path, name, pipeline_folder):
    torch.save({"state_dict": load_file(checkpoint[0])}, tmp_path / "old.ckpt")
    model = bentoml_diffusers.import_model(
        name, tmp_path / "old.ckpt", config=pipeline_folder, allow_pickle=True
    )
    unet = bentoml_diffusers.load_model(model).unet.state_dict()
    assert all(torch.equal(unet[k], v) for k, v in checkpoint[1].unet.state_dict().items())


@pytest.mark.slow
def test_models_of_bentomls_own_module_may_hold_pickles(pickled, name):
    """It stores a folder as it is; what is in its store already still loads."""
    for file in (pickled / "text_encoder").glob("pytorch_model*"):
        file.unlink()
    save_file(
        {
            k: v.contiguous()
            for k, v in testing.tiny_stable_diffusion().text_encoder.state_dict().items()
        },
        pickled / "text_encoder" / "model.safetensors",
        metadata={"format": "pt"},
    )
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import bentoml\n"
        f"bentoml.diffusers.import_model({name!r}, {str(pickled)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    pipeline = bentoml_diffusers.load_model(name)
    assert np.isfinite(next(pipeline.vae.parameters()).detach().numpy()).all()
    assert store.verify(bentoml_diffusers.get(name)) is None
