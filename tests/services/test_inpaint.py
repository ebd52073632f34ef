"""`POST /inpaint` of `bentoml diffusers demo`: white is regenerated, black stays."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

PROMPT = "a big red circle on a white background at the right"
FORM = {"prompt": PROMPT, "seed": "1", "num_inference_steps": "12", "guidance_scale": "4"}


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def make_mask(size=(64, 64), mode="L"):
    """White on the right."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((size[0] // 2, 0, *size), fill="white")
    if mode == "I;16":  # nearly black and nearly white
        return Image.fromarray(np.where(np.asarray(mask), 65_000, 300).astype(np.uint16))
    return mask.convert(mode)


@pytest.fixture(scope="module")
def scene():
    """A blue square at the left of a white image."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((6, 20, 24, 44), fill=(30, 60, 220))
    return image


@pytest.fixture
def inpaint(demo_server):
    def post(image, mask, **fields):
        files = {"image": ("a.png", encode(image)), "mask_image": ("b.png", encode(mask))}
        return demo_server.client.post("/inpaint", files=files, data={**FORM, **fields})

    return post


def test_white_is_generated_anew_and_black_stays(inpaint, scene, open_image):
    answer = inpaint(scene, make_mask())
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-seed"] == "1"
    before, after = (np.asarray(one, int) for one in (scene, open_image(answer.content)))
    assert after.shape == before.shape
    changed = abs(after - before).max(axis=-1)
    assert np.median(changed[:, :28]) < 20  # but for what the autoencoder loses
    red = (after[..., 0] - after[..., 1:].max(axis=-1)) > 80
    assert red[:, 34:].mean() > 0.1
    assert not red[:, :26].any()


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode_mean_the_same(inpaint, scene, open_image, mode):
    plain, other = (open_image(inpaint(scene, make_mask(mode=one)).content) for one in ("L", mode))
    assert plain.tobytes() == other.tobytes()


@pytest.mark.parametrize("size", [(60, 92), (33, 17), (64, 48)])
def test_the_size_is_that_of_the_image(inpaint, demo_server, scene, open_image, size):
    answer = inpaint(scene.resize(size), make_mask(size), num_inference_steps="1")
    assert open_image(answer.content).size == size
    again = demo_server.client.post("/replay", files={"workflow": ("a.png", answer.content)})
    assert again.headers["x-workflow-match"] == "true"
    assert open_image(again.content).tobytes() == open_image(answer.content).tobytes()


def test_a_size_that_is_asked_for(inpaint, scene, open_image):
    for width, height in ((48, 32), (None, 40), (40, None)):
        sides = {"width": width, "height": height}
        sides = {name: str(side) for name, side in sides.items() if side}
        answer = inpaint(scene, make_mask(), num_inference_steps="1", **sides)
        assert open_image(answer.content).size == (width or 64, height or 64)


@pytest.mark.parametrize("size", [(64, 64), (60, 92)])
@pytest.mark.parametrize("padding", ["0", "8", "500"])
def test_black_stays_to_the_pixel_where_what_was_made_is_pasted(
    inpaint, demo_server, open_image, size, padding
):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((20, 20, 40, 50), fill="white")
    answer = inpaint(image, mask, num_inference_steps="2", padding_mask_crop=padding)
    assert answer.status_code == 200, answer.text
    after = np.asarray(open_image(answer.content))
    kept = np.asarray(mask) == 0
    assert (after[kept] == noise[kept]).all()
    assert (after[~kept] != noise[~kept]).any(axis=-1).mean() > 0.9
    again = demo_server.client.post("/replay", files={"workflow": ("a.png", answer.content)})
    assert again.headers["x-workflow-match"] == "true"


def test_strength(inpaint, scene, open_image):
    generated = [
        np.asarray(open_image(inpaint(scene, make_mask(), strength=one).content), int)
        for one in ("0.1", "1")
    ]
    weak, strong = (abs(one - np.asarray(scene, int))[:, 34:].mean() for one in generated)
    assert weak < strong


def test_it_generates_itself_again(inpaint, demo_server, scene):
    original = inpaint(scene, make_mask(), num_inference_steps="3")
    answer = demo_server.client.post("/replay", files={"workflow": ("a.png", original.content)})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-workflow-match"] == "true"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"mask_image": encode(make_mask((32, 64)))}, "mask_image"),
        ({"mask_image": b"no image"}, "mask_image"),
        ({"mask_image": None}, "mask_image"),
        ({"image": None}, "image"),
        ({"strength": "0"}, "strength"),
        ({"width": "33"}, "width"),
        ({"width": "5000"}, "width"),
        ({"mask_blur": "4"}, "mask_blur"),
        ({"padding_mask_crop": "-1"}, "padding_mask_crop"),
    ],
)
def test_what_is_wrong_is_named(demo_server, scene, fields, place):
    files = {"image": encode(scene), "mask_image": encode(make_mask())}
    data = dict(FORM)
    for name, value in fields.items():
        (files if name in files else data)[name] = value
    files = {name: (name, content) for name, content in files.items() if content is not None}
    answer = demo_server.client.post("/inpaint", files=files, data=data)
    assert answer.status_code == 400
    assert answer.json()["detail"][0]["loc"] == [place]
    assert answer.json()["error"].startswith(f"{place}: ")


def test_nothing_to_paste(inpaint, scene):
    answer = inpaint(scene, Image.new("L", scene.size), padding_mask_crop="8")
    assert answer.status_code == 400
    assert "padding_mask_crop needs white in mask_image" in answer.json()["error"]


def test_a_wrong_mask_in_a_replay_is_named(inpaint, demo_server, scene):
    original = inpaint(scene, make_mask(), num_inference_steps="1")
    mask = base64.b64encode(encode(make_mask((32, 32)))).decode()
    answer = demo_server.client.post(
        "/replay",
        files={"workflow": ("a.png", original.content)},
        data={"overrides": json.dumps({"mask_image": mask})},
    )
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("overrides.mask_image: ")
    assert " at 0x" not in answer.text
