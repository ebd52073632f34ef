"""The example: differential diffusion keeps what the map keeps, alone and with its companions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bentoml_diffusers import Engine, import_model, load_model, testing

sys.path.append(str(Path(__file__).parent.parent / "examples" / "differential_diffusion"))
import small_sdxl
import write_repository
from block import DifferentialDiffusionBlocks

CALL = {"prompt": "a red circle", "num_inference_steps": 6}


def make_map(*columns, side=32):
    """A map with columns of equal width: 255 keeps, 0 repaints."""
    values = np.repeat(np.array(columns, dtype=np.uint8), side // len(columns))
    return Image.fromarray(np.tile(values, (side, 1)))


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipeline():
    blocks = DifferentialDiffusionBlocks()
    return testing.tiny_modular_stable_diffusion_xl(blocks=blocks, controlnet=True)


@pytest.fixture(scope="module")
def generate(pipeline):
    """Generates with diffusers alone; returns what was asked for."""

    def call(output="latents", seed=3, **inputs):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(**{**CALL, **inputs}, generator=generator, output=output)

    return call


class TestMap:
    def distances(self, generate, image, change_map):
        """How far each column of the latents is from those of the image."""
        state = generate(["latents", "image_latents"], image=image, diffdiff_map=change_map)
        distance = (state["latents"] - state["image_latents"]).abs()
        return distance.mean(dim=(0, 1, 2)).tolist()

    def test_white_keeps_and_black_repaints(self, generate, image):
        left, _, _, right = self.distances(generate, image, make_map(255, 255, 0, 0))
        assert left < right / 4

    def test_the_darker_the_more_is_generated(self, generate, image):
        white, light, dark, black = (
            np.mean(self.distances(generate, image, make_map(value))) for value in (255, 170, 85, 0)
        )
        assert white < light < dark < black

    def test_the_first_latents_are_those_of_the_image_noised(self, pipeline, generate, image):
        state = generate(
            ["noise", "image_latents", "timesteps"], image=image, diffdiff_map=make_map(0)
        )
        scheduler = pipeline.scheduler
        first = scheduler.add_noise(state["image_latents"], state["noise"], state["timesteps"][:1])
        assert first.std() > 5 * state["image_latents"].std()

    def test_text2image_stays(self, generate):
        plain = testing.tiny_modular_stable_diffusion_xl()
        generator = torch.Generator().manual_seed(3)
        expected = plain(**CALL, generator=generator, output="latents")
        assert torch.equal(generate(), expected)

    def test_image2image_stays(self, generate, image):
        plain = testing.tiny_modular_stable_diffusion_xl()
        generator = torch.Generator().manual_seed(3)
        call = {"image": image, "strength": 0.5}
        expected = plain(**CALL, **call, generator=generator, output="latents")
        assert torch.equal(generate(**call), expected)


class TestCompanions:
    def test_with_a_controlnet(self, pipeline, image):
        inputs = {"image": image, "diffdiff_map": make_map(255, 0)}
        with Engine(pipeline) as engine:
            alone = engine.run("differential", **CALL, seed=3, **inputs)
            controlled, none = (
                engine.run(
                    "controlnet_differential",
                    **CALL,
                    seed=3,
                    **inputs,
                    control_image=image,
                    controlnet_conditioning_scale=scale,
                )
                for scale in (1.0, 0.0)
            )
        assert np.array_equal(alone.images[0], none.images[0])
        assert not np.array_equal(alone.images[0], controlled.images[0])

    def test_with_an_ip_adapter_and_a_controlnet(self, tmp_path, image):
        pipeline = testing.tiny_modular_stable_diffusion_xl(
            blocks=DifferentialDiffusionBlocks(), controlnet=True, image_encoder=True
        )
        file = testing.save_tiny_ip_adapter(tmp_path)
        pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name)
        inputs = {"image": image, "diffdiff_map": make_map(255, 0)}
        with Engine(pipeline) as engine:
            first, second, third = (
                engine.run(task, **CALL, seed=3, **inputs, ip_adapter_image=look, **more).images[0]
                for task, look, more in (
                    ("ip_adapter_differential", image, {}),
                    ("ip_adapter_differential", Image.new("RGB", (32, 32), "red"), {}),
                    ("ip_adapter_controlnet_differential", image, {"control_image": image}),
                )
            )
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, third)


def test_the_repository_is_imported_with_its_guider_and_code(tmp_path, name, pipeline, image):
    guider = pipeline.guider
    pipeline.update_components(guider=guider.new(guidance_scale=3.0))
    write_repository.write_repository(pipeline, tmp_path / "repository")
    model = import_model(name, tmp_path / "repository", trust_remote_code=True)
    loaded = load_model(model)
    assert loaded.guider.guidance_scale == 3.0
    call = {**CALL, "image": image, "diffdiff_map": make_map(255, 0), "output": "images"}
    images = [
        one(**call, generator=torch.Generator().manual_seed(3))[0] for one in (pipeline, loaded)
    ]
    assert np.array_equal(*images)
    pipeline.update_components(guider=guider)


@pytest.mark.slow
def test_the_small_sdxl_generates_what_the_prompt_says_where_the_map_is_black(monkeypatch):
    monkeypatch.setattr(small_sdxl, "FIT_STEPS", 400)
    pipeline = write_repository.make_pipeline()
    call = {"num_inference_steps": 12, "seed": 3}
    with Engine(pipeline) as engine:
        red = engine.run(
            "text2image", prompt="a big red circle on a blue background at the left", **call
        ).images[0]
        both = engine.run(
            "differential",
            prompt="a big yellow star on a blue background at the right",
            image=red,
            diffdiff_map=make_map(255, 0, side=64),
            **call,
        ).images[0]
    pixels, kept = (np.asarray(one).astype(int) for one in (both, red))
    assert abs(pixels - kept)[:, :28].mean() < 15
    is_yellow = (pixels[..., :2].min(axis=-1) > 170) & (pixels[..., 2] < 130)
    assert is_yellow[:, 32:].sum() > 40
    assert is_yellow[:, :28].sum() == 0
