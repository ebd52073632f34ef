"""Operations of the package `openai` of PyPI: sync, async, streams, edits, errors, retries."""

from __future__ import annotations

import asyncio
import warnings

import openai
from operations import check_image, make_mask, make_photo, server, tell

URL = f"{server()}/v1"
PROMPT = "a big red circle on a blue background at the left"
SEED = {"seed": 1}
LORA = {"lora_weights": [{"name": "outline", "scale": 0.5}]}
PHOTO = ("photo.png", make_photo(), "image/png")
MASK = ("mask.png", make_mask(), "image/png")
images = openai.OpenAI(base_url=URL, api_key="none").images


def list_models() -> None:
    models = openai.OpenAI(base_url=URL, api_key="none").models
    names = [model.id for model in models.list()]
    assert {"demo", "demo:outline", "demo:stripes"} <= {*names}
    assert models.retrieve("demo:outline").id == "demo:outline"


def generate() -> None:
    answer = images.generate(model="demo", prompt=PROMPT, n=2, size="64x64", quality="low")
    assert len({check_image(image.b64_json) for image in answer.data}) == 2
    assert answer.usage.total_tokens == 0


def generate_with_loras() -> None:
    def pixels(model: str = "demo", **more: object) -> bytes:
        body = {**SEED, **more}
        return check_image(
            images.generate(model=model, prompt=PROMPT, extra_body=body).data[0].b64_json
        )

    plain = pixels()
    assert plain == pixels()
    assert plain != pixels("demo:outline") == pixels(lora_weights=["outline"])
    pixels("demo:outline+stripes")


def stream() -> None:
    events = list(
        images.generate(
            model="demo",
            prompt=PROMPT,
            stream=True,
            partial_images=3,
            extra_body={**SEED, "num_inference_steps": 12},
        )
    )
    kinds = [event.type for event in events]
    assert kinds == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert len({check_image(event.b64_json) for event in events}) == 4
    assert events[-1].usage.total_tokens == 0


def edit() -> None:
    plain = images.edit(model="demo", image=PHOTO, prompt=PROMPT, extra_body=SEED)
    lora = images.edit(model="demo", image=[PHOTO], prompt=PROMPT, extra_body={**SEED, **LORA})
    assert check_image(plain.data[0].b64_json) != check_image(lora.data[0].b64_json)


def edit_with_mask() -> None:
    answer = images.edit(model="demo", image=PHOTO, mask=MASK, prompt=PROMPT, size="32x32")
    check_image(answer.data[0].b64_json, (32, 32))


def stream_edit() -> None:
    events = list(
        images.edit(model="demo", image=PHOTO, prompt=PROMPT, stream=True, partial_images=1)
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    check_image(events[-1].b64_json)


def vary() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        answer = images.create_variation(model="demo", image=PHOTO, n=1)
    check_image(answer.data[0].b64_json)


def read_errors() -> None:
    for body, kind, code, param in (
        ({"steps": 3}, openai.BadRequestError, "unknown_parameter", "steps"),
        ({"background": "transparent"}, openai.BadRequestError, "unsupported_value", "background"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model"),
    ):
        try:
            images.generate(prompt=PROMPT, extra_body=body)
        except kind as error:
            assert (error.code, error.param) == (code, param)
            assert error.request_id
            assert error.response.headers["x-should-retry"] == "false"
        else:
            raise AssertionError(body)


def come_again() -> None:
    """Six requests at once, where one runs and one waits: the others are told when to come."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=20) as client:
            tasks = [
                client.images.with_raw_response.generate(model="demo", prompt=f"{PROMPT} {n}")
                for n in range(6)
            ]
            answers = await asyncio.gather(*tasks)
        for answer in answers:
            check_image(answer.parse().data[0].b64_json)
        assert max(answer.retries_taken for answer in answers) > 0

    asyncio.run(run())


def stream_async() -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=URL, api_key="none") as client:
            stream = await client.images.generate(prompt=PROMPT, stream=True, partial_images=1)
            return [event.type async for event in stream]

    partial, completed = asyncio.run(run())
    assert partial == "image_generation.partial_image"
    assert completed == "image_generation.completed"


if __name__ == "__main__":
    for operation, work in {
        "models": list_models,
        "generate": generate,
        "LoRA": generate_with_loras,
        "stream": stream,
        "edit": edit,
        "edit with a mask": edit_with_mask,
        "stream an edit": stream_edit,
        "variation": vary,
        "errors": read_errors,
        "retries": come_again,
        "async stream": stream_async,
    }.items():
        tell("openai (Python)", operation, work)
