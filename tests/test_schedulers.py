"""One list of schedulers: what is on it generates, and what does not is not on it."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build

from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.engine.requests.scheduler_calls import fitting_schedulers

T5 = {"prompt": "a", "max_sequence_length": 24, "height": 32, "width": 32}
FAMILIES = {
    "ddpm": {},
    "ddim": {},
    "pndm": {},
    "ldm": {},
    "ldm-text": {"prompt": "a"},
    "sd": {"prompt": "a"},
    "sdxl": {"prompt": "a"},
    "sd3": T5,
    "flux": T5,
    "pixart-sigma": {**T5, "use_resolution_binning": False, "clean_caption": False},
    "dance-diffusion": {"audio_length_in_s": 512 / 16_000},
}
NO_CHECKER = {testing.tiny_stable_diffusion: {"requires_safety_checker": False}}
IMAGE = Image.new("RGB", (32, 32), "green")


@pytest.fixture(scope="module")
def sd():
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        yield engine


@pytest.mark.parametrize("family", FAMILIES)
def test_each_scheduler_of_the_list_generates_and_no_other_is_taken(family):
    pipeline = build(family)
    with Engine.from_model(pipeline) as engine:
        listed = fitting_schedulers(pipeline.scheduler, type(pipeline))
        assert type(pipeline.scheduler).__name__ in listed
        for name in listed:
            call = {**FAMILIES[family], "num_inference_steps": 4, "seed": 1}
            result = engine.run("__call__", **call, scheduler=name)
            assert result.scheduler == name
            assert np.isfinite(np.asarray(result.output[0][0], dtype=float)).all()
        others = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        for name in set(others) - set(listed):
            with pytest.raises(errors.InvalidRequest, match="scheduler") as caught:
                engine.submit("__call__", **FAMILIES[family], scheduler=name)
            assert f", {name}" not in str(caught.value).partition("fits this model")[2]


def test_a_scheduler_whose_package_is_missing_says_so(sd):
    with pytest.raises(errors.InvalidRequest, match=r"needs .*torchsde"):
        sd.submit("txt2img", prompt="a", scheduler="DPMSolverSDEScheduler")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_says_how_many_steps_it_needs(sd, steps):
    given = {"prompt": "a", "num_inference_steps": steps}
    with pytest.raises(errors.InvalidRequest, match=r"num_inference_steps.* at least 4"):
        sd.submit("txt2img", **given, scheduler="PNDMScheduler")
    assert sd.run("txt2img", **given, scheduler="PLMS").images


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_a_schedule_for_a_scheduler_that_takes_none_is_refused(sd, name):
    with pytest.raises(errors.InvalidRequest, match=rf"{name}.*DDIMScheduler chooses its own"):
        sd.submit("txt2img", prompt="a", **{name: [10, 5]}, scheduler="DDIM")
    call = {"prompt": "a", name: [10, 5] if name == "timesteps" else [9.0, 1.0]}
    assert sd.run("txt2img", **call, scheduler="Euler").images


@pytest.mark.parametrize(
    ("make", "scheduler", "more"),
    [
        (testing.tiny_stable_diffusion, "PLMS", {"prompt": "a"}),
        (testing.tiny_flux, None, T5),
        (testing.tiny_stable_diffusion_3, None, T5),
    ],
)
def test_a_low_strength_is_counted_as_the_pipeline_counts_it(make, scheduler, more):
    """PNDM has a timestep more than steps, flows round up: a step is left."""
    call = {**more, "image": IMAGE, "num_inference_steps": 5, "strength": 0.1}
    with Engine.from_model(make()) as engine:
        ours = engine.run("img2img", **call, seed=1, scheduler=scheduler).images[0]
        pipeline = engine.find_task("img2img").pipeline_class(
            **make().components, **NO_CHECKER.get(make, {})
        )
    if scheduler is not None:
        config = {**pipeline.scheduler.config, "skip_prk_steps": True}
        pipeline.scheduler = diffusers.PNDMScheduler.from_config(config)
    theirs = pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0]
    assert ours.tobytes() == theirs.tobytes()
