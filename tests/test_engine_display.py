"""`repr` of engines, services and results, and what a notebook shows."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from bentoml_diffusers import Engine, Result, service, testing
from bentoml_diffusers.engine.requests import display

CALL = {"prompt": "a secret prompt", "num_inference_steps": 2, "seed": 7}
SHOWN = re.compile(r'<img src="data:image/png;base64,([^"]+)"')


def read_shown(result):
    found = SHOWN.findall(result._repr_html_())
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.fixture(scope="module")
def engine(model):
    with Engine.from_model(model, device="cpu") as engine:
        yield engine


def test_an_engine_names_its_model_and_its_load(engine, model):
    expected = f"StableDiffusionPipeline {model.tag} on cpu"
    assert repr(engine) == f"<Engine: {expected}, 0 running, 0 waiting>"


def test_an_engine_of_a_pipeline_has_no_tag_and_may_be_closed():
    engine = Engine.from_model(testing.tiny_stable_diffusion(), device="cpu")
    engine.close()
    assert repr(engine) == "<Engine: StableDiffusionPipeline on cpu, closed>"


def test_a_service_names_its_endpoints_and_its_engine(model):
    made = service(str(model.tag), name="shapes")()
    try:
        assert repr(made).startswith(
            "<Service 'shapes': txt2img, img2img, inpaint, replay, adapters; <Engine: "
        )
        assert str(model.tag) in repr(made)
    finally:
        made.close_engine()


def test_a_result_is_one_line_without_its_prompt(engine):
    result = engine.run("txt2img", **CALL, num_images_per_prompt=2, return_workflow=True)
    size = "x".join(map(str, result.images[0].size))
    assert re.fullmatch(
        rf"<Result: 2 images of {size}, seeds 7 8, 2 steps, \d+\.\d\d s, with its workflow>",
        repr(result),
    )
    assert "secret" not in result._repr_html_()


def test_a_result_of_tensors_has_their_shape_only(engine):
    result = engine.run("txt2img", **CALL, output_type="latent")
    assert f"Tensor of {'x'.join(map(str, result.output[0].shape))}," in repr(result)
    assert len(repr(result)) < 100
    assert read_shown(result) == []


def test_a_notebook_shows_the_images(engine):
    result = engine.run("txt2img", **CALL)
    (shown,) = read_shown(result)
    assert shown.format == "PNG"
    assert shown.tobytes() == result.images[0].tobytes()


def test_what_a_notebook_keeps_is_bounded():
    images = [Image.effect_noise((2000, 1000), 90) for _ in range(20)]
    result = Result(output=(images,), seeds=tuple(range(20)), warnings=("one", "two"))
    shown = read_shown(result)
    assert [image.size for image in shown] == [(display.MAX_SIDE, 256)] * display.MAX_IMAGES
    assert images[0].size == (2000, 1000)
    assert repr(result) == (
        "<Result: 20 images of 2000x1000, seeds 0 1 2 3 and 16 more, 0.00 s, 2 warnings>"
    )
    assert "(8 of them shown)" in result._repr_html_()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ((), "nothing"),
        ((torch.zeros(1, 4, 8, 8),), "Tensor of 1x4x8x8"),
        (([[Image.new("RGB", (8, 6))] * 3] * 2,), "2 x 3 images of 8x6"),
        (([],), "list"),
        (({"a": 1},), "dict"),
    ],
)
def test_any_output_has_a_line(output, expected):
    result = Result(output=output, adapters=("<b>",), batches={2: 1})
    assert repr(result) == f"<Result: {expected}, adapter <b>, batched, 0.00 s>"
    assert "<b>" not in result._repr_html_()


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "F", "CMYK", "RGBA", "P"])
def test_images_of_any_mode_are_shown(mode):
    (shown,) = read_shown(Result(output=([Image.new(mode, (8, 6))],)))
    assert shown.size == (8, 6)
