"""Denoisers that the caller compiled: all that runs on a plain one runs on them."""

import numpy as np
import pytest
import torch
from adapter_models import ATTENTION, save_lora

from bentoml_diffusers import Engine, _compat, testing

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "output_type": "np"}


def wrap(pipeline):
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def wrap_a_block(pipeline):
    pipeline.unet.up_blocks[1] = torch.compile(pipeline.unet.up_blocks[1], backend="eager")


def in_place(pipeline):
    pipeline.unet.compile(backend="eager")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A LoRA for slots, and one that only PEFT can apply."""
    folder = tmp_path_factory.mktemp("loras")
    make = testing.tiny_stable_diffusion
    save_lora(folder / "plain.safetensors", make, {"unet": ATTENTION})
    save_lora(folder / "dora.safetensors", make, {"unet": ATTENTION}, use_dora=True)
    return folder


@pytest.mark.parametrize("compile_it", [wrap, wrap_a_block, in_place])
@pytest.mark.parametrize("static", [None, "plain.safetensors"])
def test_loras_work_on_a_compiled_denoiser_as_on_a_plain_one(loras, compile_it, static):
    names = [None, "plain.safetensors", "dora.safetensors", None]
    options = {"lora_dir": str(loras), "lora_weights": static}

    def generate(pipeline, *, compiled):
        with Engine.from_model(pipeline, **options) as engine:
            assert _compat.is_compiled(engine.pipeline.unet) == compiled
            return [engine.run("txt2img", lora_weights=name, **CALL).output[0] for name in names]

    pipeline = testing.tiny_stable_diffusion()
    compile_it(pipeline)
    expected = generate(testing.tiny_stable_diffusion(), compiled=False)
    assert all(np.abs(image - expected[0]).max() > 0.01 for image in expected[1:3])
    for image, wanted in zip(generate(pipeline, compiled=True), expected, strict=True):
        assert np.abs(image - wanted).max() < 1 / 255
