"""A request that runs alone is diffusers' own call, bit for bit, whatever ran before it."""

import contextlib
import functools

import diffusers
import numpy as np
import pytest
import torch
from adapter_models import ATTENTION, FAMILIES, save_lora

from bentoml_diffusers import Engine
from bentoml_diffusers.adapters import supports_lora

CALL = {
    "prompt": "a red circle",
    "num_inference_steps": 3,
    "height": 32,
    "width": 32,
    "output_type": "np",
}
NOISE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
SCHEDULERS = {
    name: ("FlowMatchEulerDiscreteScheduler",) if name in ("flux", "sd3") else NOISE
    for name in FAMILIES
}


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    """Gives the engine of a family, and how a request of it names a LoRA, if it can."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(name):
            make, folder = FAMILIES[name][0], tmp_path_factory.mktemp(name)
            pipeline, history = make(), {}
            if supports_lora(pipeline):
                denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
                save_lora(folder / "x.safetensors", make, {denoiser: ATTENTION})
                history = {"lora_weights": "x.safetensors"}
            engine = Engine.from_model(pipeline, lora_dir=str(folder))
            return stack.enter_context(engine), history

        yield start


@pytest.mark.parametrize(
    ("name", "scheduler"), [(name, one) for name, all_ in SCHEDULERS.items() for one in all_]
)
def test_a_lone_request_is_the_call_of_diffusers(engine_of, name, scheduler):
    make, arguments = FAMILIES[name]
    reference = make()
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = getattr(diffusers, scheduler).from_config(reference.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    expected = reference(**CALL, **arguments, generator=generator).images

    engine, history = engine_of(name)
    call = {**CALL, **arguments, "scheduler": scheduler, "seed": 7}
    before = engine.run("__call__", **call, **history).output[0]
    assert np.array_equal(before, expected) == (not history)
    assert np.array_equal(engine.run("__call__", **call).output[0], expected)
