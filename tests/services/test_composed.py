"""A service that is called by another one: BentoML sends pickles, over a Unix socket."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bentoml_diffusers

CALL = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 5}
PICKLE = "application/vnd.bentoml+pickle"


@pytest.fixture(scope="module")
def front(serve, tiny_home):
    folder = Path(__file__).parent
    with serve("composed_service:Front", home=tiny_home, folder=folder) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny_model):
    with bentoml_diffusers.Engine.from_model(tiny_model) as running:
        yield running


def call(front, path, colours=None, **arguments):
    body = {"path": path, "arguments": {**CALL, **arguments}, "colours": colours or {}}
    return front.client.post("/generate", json=body)


def assert_same(answer, image, open_image):
    assert answer.status_code == 200, answer.text
    generated = np.asarray(open_image(answer.content)).astype(int)
    assert np.abs(generated - np.asarray(image)).max() <= 1  # another process sums in another order


def test_image_from_text(front, engine, open_image):
    expected = engine.run("txt2img", **CALL).images[0]
    assert_same(call(front, "txt2img"), expected, open_image)
    assert_same(
        front.client.post("/generate_in_turn", json={"arguments": CALL}), expected, open_image
    )


def test_image_from_an_image(front, engine, open_image):
    arguments = {"image": Image.new("RGB", (32, 32), "navy"), "strength": 0.6}
    expected = engine.run("img2img", **CALL, **arguments).images[0]
    assert_same(call(front, "img2img", {"image": "navy"}, strength=0.6), expected, open_image)


def test_adapters_of_a_request_and_of_the_service(front):
    plain, other = call(front, "txt2img"), call(front, "txt2img", lora_weights="tiny-lora")
    assert plain.status_code == other.status_code == 200
    assert plain.content != other.content
    assert "tiny-lora" in front.client.post("/adapters", json={}).text


@pytest.mark.parametrize(
    ("path", "arguments", "colours", "status", "field"),
    [
        ("txt2img", {"num_inference_steps": 100_000}, {}, 400, "num_inference_steps"),
        ("txt2img", {"heigth": 64}, {}, 400, "heigth"),
        ("txt2img", {"lora_weights": "no-lora"}, {}, 404, "lora_weights"),
        ("img2img", {}, {}, 400, "image"),
        ("inpaint", {}, {"image": "red"}, 400, "mask_image"),
    ],
)
def test_errors_keep_their_status(front, path, arguments, colours, status, field):
    answer = call(front, path, colours, **arguments)
    assert answer.status_code == status, answer.text
    assert field in answer.text


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("media_type", [PICKLE, PICKLE.title(), f"{PICKLE}; charset=utf-8"])
@pytest.mark.parametrize("path", ["/txt2img", "/img2img", "/replay", "/adapters"])
def test_a_public_port_refuses_pickles_in_one_line(demo_server, tmp_path, path, media_type):
    before = len(demo_server.log)
    answer = demo_server.client.post(
        path,
        content=pickle.dumps({"prompt": Trap(tmp_path / "made")}),
        headers={"content-type": media_type},
    )
    assert answer.status_code == 415
    assert not (tmp_path / "made").exists()
    assert "Traceback" not in demo_server.log[before:]
