"""BentoML's own client writes each field of a form as JSON; it gets what anybody gets."""

import asyncio
import contextlib
import json

import bentoml
import pytest
from PIL import Image, ImageChops

CALL = {"prompt": "a red circle", "num_inference_steps": 3}
FIELDS = (
    {"seed": 7},
    {"seed": 7, "scheduler": "Euler a"},
    {"seed": 7, "lora_weights": "outline"},
    {"seed": 7, "lora_weights": [{"name": "outline", "scale": 0.5}]},
    {"seed": 7, "guidance_scale": 2.5, "height": 48, "width": 64},
    {"seed": 7, "negative_prompt": "", "scheduler": None},
    {"seed": 7, "prompt": '"quoted"'},
    {"seed": 7, "prompt": "12"},
)


@pytest.fixture(scope="module")
def client(demo_server):
    with bentoml.SyncHTTPClient(demo_server.url) as running:
        yield running
    running._temp_dir.cleanup()  # BentoML 1.4.39 leaves it


@pytest.fixture
def files(tmp_path, encode):
    paths = {"image": tmp_path / "image.png", "mask_image": tmp_path / "mask.png"}
    paths["image"].write_bytes(encode(colour=(200, 40, 40), size=(64, 64)))
    paths["mask_image"].write_bytes(encode("PNG", "L", colour=255, size=(64, 64)))
    return paths


def assert_same(image, body, open_image):
    expected = open_image(body)
    difference = ImageChops.difference(image.convert("RGB"), expected)
    assert max(high for _, high in difference.getextrema()) <= 1  # requests may share forwards


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_text_and_numbers(client, demo_server, open_image, fields):
    body = demo_server.generate(**{**CALL, **fields})
    assert_same(client.txt2img(**{**CALL, **fields}), body, open_image)


@pytest.mark.parametrize("path", ["img2img", "inpaint"])
def test_files(client, demo_server, open_image, files, path):
    names = ["image"] if path == "img2img" else ["image", "mask_image"]
    form = {**CALL, "seed": "3"}
    answer = demo_server.client.post(
        f"/{path}", files={name: files[name].read_bytes() for name in names}, data=form
    )
    given = {name: files[name] for name in names}
    image = getattr(client, path)(**CALL, seed=3, **given)
    assert_same(image, answer.content, open_image)
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(Image.open(file)) for name, file in given.items()}
        image = getattr(client, path)(**CALL, seed=3, **opened)
    assert_same(image, answer.content, open_image)


def test_replay(client, demo_server, open_image, tmp_path):
    body = demo_server.generate(**CALL, seed=9)
    workflow = tmp_path / "image.png"
    workflow.write_bytes(body)
    assert_same(client.replay(workflow=workflow, strict=True), body, open_image)
    other = client.replay(workflow=workflow, overrides={"prompt": "a blue star"})
    assert_same(
        other, demo_server.generate(**{**CALL, "prompt": "a blue star"}, seed=9), open_image
    )


def test_adapters(client):
    assert "outline" in json.dumps(client.adapters())


def test_without_waiting(demo_server, open_image, files):
    async def call():
        async with bentoml.AsyncHTTPClient(demo_server.url) as running:
            answers = await asyncio.gather(
                running.txt2img(**CALL, seed=7, lora_weights="outline"),
                running.img2img(**CALL, seed=7, image=files["image"]),
                running.adapters(),
            )
        running._temp_dir.cleanup()
        return answers

    image, _, adapters = asyncio.run(call())
    body = demo_server.generate(**CALL, seed=7, lora_weights="outline")
    assert_same(image, body, open_image)
    assert "outline" in json.dumps(adapters)


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"seed": "seven"}, 400, "seed"),
        ({"lora_weights": "no-such"}, 404, "no-such"),
        ({"scheduler": "Eular"}, 400, "Euler"),
    ],
)
def test_errors(client, fields, status, word):
    with pytest.raises(bentoml.exceptions.BentoMLException, match=word) as caught:
        client.txt2img(**CALL, **fields)
    assert int(caught.value.error_code) == status


@pytest.mark.parametrize("prompt", ['"quoted"', "12", "null", "true"])
def test_a_form_of_another_client_is_literal(demo_server, prompt):
    literal = demo_server.generate(prompt=prompt, seed=1, num_inference_steps=3)
    form = {"prompt": prompt, "seed": "1", "num_inference_steps": "3"}
    answer = demo_server.client.post("/txt2img", files={"prompt": (None, prompt)}, data=form)
    assert answer.status_code == 400  # given twice
    del form["prompt"]
    answer = demo_server.client.post("/txt2img", files={"prompt": (None, prompt)}, data=form)
    assert answer.content == literal
