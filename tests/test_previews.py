"""Previews without the autoencoder: coarse colours, for the latents of many kinds of models."""

import asyncio

import diffusers
import numpy as np
import pytest
import torch

from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.demo import PIPELINE
from bentoml_diffusers.engine.views.colours import find_factors

SMALL = {"prompt": "a", "num_inference_steps": 2, "seed": 1}


def previews(engine, task="txt2img", **arguments):
    async def collect():
        call = {**SMALL, "preview_every": 1, **arguments}
        return [step async for step in engine.stream(task, **call)]

    *steps, result = asyncio.run(collect())
    return [step.preview for step in steps if step.preview is not None], result


@pytest.mark.parametrize(
    "make",
    [
        testing.tiny_stable_diffusion,
        testing.tiny_stable_diffusion_xl,
        testing.tiny_stable_diffusion_3,
        testing.tiny_flux,
    ],
)
def test_of_many_families(make):
    """Packed latents and those with a shift among them."""
    with Engine(make()) as engine:
        fast, result = previews(engine, preview_quality="fast")
        assert [image.size for image in fast] == [result.images[0].size]
        again = engine.run("txt2img", **SMALL)
    assert again.images[0].tobytes() == result.images[0].tobytes()  # nothing else is touched


def test_they_show_what_the_autoencoder_shows():
    pipeline = diffusers.DiffusionPipeline.from_pretrained(PIPELINE)
    scene = {
        "prompt": "a big red circle on a blue background at the left",
        "num_inference_steps": 6,
    }
    with Engine(pipeline) as engine:
        full, _ = previews(engine, **scene)
        fast, _ = previews(engine, **scene, preview_quality="fast")
    likeness = [
        np.corrcoef(*(np.asarray(one.resize((16, 16))).ravel() for one in pair))[0, 1]
        for pair in zip(full, fast, strict=True)
    ]
    assert len(likeness) == 5
    assert np.mean(likeness) > 0.6  # 0.8 here; unrelated images have 0


def test_the_factors_are_fitted_once_and_known_to_views():
    vae = testing.tiny_stable_diffusion().vae
    view = object.__new__(type(vae))
    view.__dict__.update(vae.__dict__)
    assert find_factors(vae) is find_factors(view)


def test_an_autoencoder_that_overflows_in_half_precision():
    vae = testing.tiny_stable_diffusion().vae
    whole = find_factors(vae).weight
    half = testing.tiny_stable_diffusion().vae.to(torch.float16)
    half.register_to_config(force_upcast=True)
    assert torch.allclose(find_factors(half).weight, whole, atol=0.01)
    assert half.dtype == torch.float16


def test_latents_that_cannot_be_shown():
    """Packed latents of videos: no preview, and no error."""
    with Engine(testing.tiny_ltx()) as engine:
        arguments = {"num_frames": 9, "height": 32, "width": 32, "preview_quality": "fast"}
        shown, result = previews(engine, "__call__", **arguments)
    assert shown == []
    assert result.steps == 2


def test_an_unknown_quality():
    with pytest.raises(errors.InvalidRequest, match="preview_quality"):
        Engine(testing.tiny_stable_diffusion()).submit("txt2img", **SMALL, preview_quality="best")
