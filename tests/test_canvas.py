"""`keep_size`: the answer has the size of the image that came; nothing is resampled."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import bentoml_diffusers
from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.tasks import read_method
from bentoml_diffusers.workflow import Workflow
from bentoml_diffusers.workflow.files import summarize
from bentoml_diffusers.workflow.replay import Canvas, fit_to_image

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "strength": 1.0, "seed": 1}


def make_image(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise)


def make_mask(size):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((size[0] // 2, 0, *size), fill="white")
    return mask


def inputs_of(task, size):
    image = {"image": make_image(size)}
    return image if task == "img2img" else {**image, "mask_image": make_mask(size)}


PIPELINES = {
    "sd": testing.tiny_stable_diffusion,
    "sdxl": testing.tiny_stable_diffusion_xl,
    "flux": testing.tiny_flux,
}


@pytest.fixture(scope="module", params=PIPELINES)
def engine(request):
    with Engine(PIPELINES[request.param]()) as running:
        yield running


class TestEngine:
    @pytest.mark.parametrize("task", ["img2img", "inpaint"])
    @pytest.mark.parametrize("size", [(50, 35), (32, 32), (33, 48)])
    def test_the_size_that_came(self, engine, task, size):
        result = engine.run(task, **CALL, **inputs_of(task, size), keep_size=True)
        assert [one.size for one in result.images] == [size]

    def test_sd3(self):
        with Engine(testing.tiny_stable_diffusion_3()) as engine:
            result = engine.run("img2img", **CALL, **inputs_of("img2img", (50, 35)), keep_size=True)
        assert result.images[0].size == (50, 35)

    @pytest.mark.parametrize("task", ["img2img", "inpaint"])
    def test_a_size_that_fits_is_the_call_of_diffusers(self, task):
        """Bit for bit, also at multiples of 8 that are none of 16."""
        size = (40, 24)
        with Engine(testing.tiny_stable_diffusion()) as engine:
            result = engine.run(task, **CALL, **inputs_of(task, size), keep_size=True)
        cls = {
            "img2img": diffusers.StableDiffusionImg2ImgPipeline,
            "inpaint": diffusers.StableDiffusionInpaintPipeline,
        }[task]
        parts = testing.tiny_stable_diffusion().components
        pipeline = cls(**parts, requires_safety_checker=False)
        call = {key: value for key, value in CALL.items() if key != "seed"}
        sides = {} if task == "img2img" else {"width": size[0], "height": size[1]}
        generator = torch.Generator().manual_seed(1)
        plain = pipeline(**call, **inputs_of(task, size), **sides, generator=generator)
        assert result.images[0].tobytes() == plain.images[0].tobytes()

    def test_without_it_the_pipeline_chooses(self):
        with Engine(testing.tiny_stable_diffusion()) as engine:
            result = engine.run("img2img", **CALL, image=make_image((50, 35)))
        assert result.images[0].size == (48, 32)

    def test_what_was_padded_is_what_diffusers_gets(self):
        """The same as padding and cropping by hand."""
        image = make_image((50, 35))
        padded = Image.fromarray(np.pad(np.asarray(image), ((0, 5), (0, 6), (0, 0)), mode="edge"))
        with Engine(testing.tiny_stable_diffusion()) as engine:
            ours = engine.run("img2img", **CALL, image=image, keep_size=True).images[0]
            by_hand = engine.run("img2img", **CALL, image=padded).images[0].crop((0, 0, 50, 35))
        assert ours.tobytes() == by_hand.tobytes()

    def test_several_images_and_previews(self):
        inputs = inputs_of("inpaint", (50, 35))
        call = {**CALL, "num_images_per_prompt": 2, "keep_size": True}

        async def read(engine):
            return [
                event async for event in engine.stream("inpaint", **call, **inputs, preview_every=1)
            ]

        import asyncio

        with Engine(testing.tiny_stable_diffusion()) as engine:
            *steps, result = asyncio.run(read(engine))
        previews = [step.preview for step in steps if step.preview is not None]
        assert previews
        assert {one.size for one in (*previews, *result.images)} == {(50, 35)}


class TestReplay:
    @pytest.fixture(scope="class")
    def recorded(self):
        with Engine(testing.tiny_stable_diffusion()) as engine:
            inputs = inputs_of("inpaint", (50, 35))
            result = engine.run("inpaint", **CALL, **inputs, keep_size=True, return_workflow=True)
            workflow = Workflow.from_json(result.workflow.to_json())
            assert engine.replay(workflow).replay.matches
            return result.images[0], workflow

    def test_on_a_plain_pipeline(self, recorded):
        image, workflow = recorded
        parts = testing.tiny_stable_diffusion().components
        pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        output, report = bentoml_diffusers.replay(pipeline, workflow)
        assert report.matches
        assert output.images[0].tobytes() == image.tobytes()

    def test_people_read_it(self, recorded):
        assert ("size", "that of the input image") in summarize(recorded[1])
        other = recorded[1].model_copy(update={"keep_size": False})
        assert "size" not in dict(summarize(other))

    def test_a_size_among_the_overrides(self, recorded):
        with Engine(testing.tiny_stable_diffusion()) as engine:
            result = engine.replay(recorded[1], height=32, width=32)
        assert result.images[0].size == (32, 32)


def test_the_size_that_a_pipeline_chose_by_itself_is_resized():
    canvas = Canvas((50, 35), (56, 40))
    assert canvas.restore_image(make_image((128, 128))).size == (50, 35)
    output = canvas.restore(([make_image((56, 40))], [False]))
    assert [one.size for one in output[0]] == [(50, 35)]
    assert output[1] == [False]


def test_images_of_another_meaning_stay():
    pipeline = testing.tiny_stable_diffusion()
    given = {"image": make_image((50, 35)), "ip_adapter_image": make_image((50, 35))}
    arguments, _ = fit_to_image(pipeline, read_method(pipeline, "__call__"), given)
    assert arguments["image"].size == (56, 40)
    assert arguments["ip_adapter_image"] is given["ip_adapter_image"]
    assert given["image"].size == (50, 35)


def test_without_an_image_there_is_nothing_to_keep():
    with Engine(testing.tiny_stable_diffusion()) as engine:
        result = engine.run("txt2img", prompt="a", num_inference_steps=1, keep_size=True)
        assert result.images[0].size == (32, 32)
        with pytest.raises(errors.InvalidRequest, match="keep_sice"):
            engine.run("txt2img", prompt="a", keep_sice=True)
