"""Methods that build on each other: refused with the way, or prepared before the engine."""

import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    StableDiffusionPAGPipeline,
)
from PIL import Image

from bentoml_diffusers import Engine, errors, testing

RANDOM = np.random.default_rng(0)
IMAGE = Image.fromarray(RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8))
EDIT = {
    "editing_prompt": ["a red circle"],
    "use_intersect_mask": False,  # the attention of a tiny UNet has no maps for it
    "output_type": "np",
}


@pytest.fixture
def ledits():
    parts = testing.tiny_stable_diffusion().components
    config = parts["scheduler"].config
    kind = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    parts["scheduler"] = DPMSolverMultistepScheduler.from_config(config, **kind)
    del parts["image_encoder"]
    pipeline = LEditsPPPipelineStableDiffusion(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_method_whose_state_would_be_lost_is_refused_with_the_way(ledits):
    with Engine(ledits) as engine:
        with pytest.raises(errors.InvalidRequest, match="init_latents"):
            engine.run("invert", image=IMAGE, num_inversion_steps=4)
        with pytest.raises(errors.InvalidRequest, match="invert stores in the pipeline"):
            engine.run("__call__", **EDIT)


def test_a_pipeline_that_was_prepared_runs(ledits):
    ledits.invert(image=IMAGE, num_inversion_steps=4, skip=0.2, height=32, width=32)
    with Engine(ledits) as engine:
        first, second = (engine.run("__call__", **EDIT).output[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(ledits(**EDIT).images, first)


def test_a_setting_is_not_a_task():
    parts = testing.tiny_stable_diffusion().components
    pipeline = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    with Engine(pipeline) as engine:
        with pytest.raises(errors.InvalidRequest, match="pag_applied_layers"):
            engine.run("set_pag_applied_layers", pag_applied_layers=["mid"])
        assert engine.run("__call__", prompt="a", num_inference_steps=1, pag_scale=0).steps == 1
