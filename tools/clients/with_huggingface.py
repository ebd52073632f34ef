"""Operations of `huggingface_hub.InferenceClient`."""

from __future__ import annotations

import asyncio

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from operations import make_photo, server, tell

PROMPT = "a big red circle on a blue background at the left"
STEPS = {"num_inference_steps": 6}


def generate() -> None:
    client = InferenceClient(model=server())
    image = client.text_to_image(PROMPT, width=64, height=32, seed=1, guidance_scale=3.0, **STEPS)
    assert image.size == (64, 32)


def generate_with_loras() -> None:
    client = InferenceClient(model=f"{server()}/models/demo:outline")
    plain = InferenceClient(model=f"{server()}/models/demo")
    lora = client.text_to_image(PROMPT, seed=1, **STEPS).tobytes()
    assert lora != plain.text_to_image(PROMPT, seed=1, **STEPS).tobytes()
    body = {"lora_weights": [{"name": "outline"}]}
    assert lora == plain.text_to_image(PROMPT, seed=1, extra_body=body, **STEPS).tobytes()


def edit() -> None:
    client = InferenceClient(model=server())
    size = {"width": 32, "height": 64}
    image = client.image_to_image(make_photo(), prompt=PROMPT, target_size=size, strength=0.6)
    assert image.size == (32, 64)


def read_errors() -> None:
    try:
        InferenceClient(model=server()).text_to_image(PROMPT, extra_body={"steps": 3})
    except HfHubHTTPError as error:
        assert error.response.status_code == 400
        assert "num_inference_steps" in str(error) + error.response.text
    else:
        raise AssertionError("no error")


def generate_async() -> None:
    async def run() -> None:
        async with AsyncInferenceClient(model=server()) as client:
            image = await client.text_to_image(PROMPT, seed=1, **STEPS)
        assert image.size == (64, 64)

    asyncio.run(run())


if __name__ == "__main__":
    for operation, work in {
        "generate": generate,
        "LoRA": generate_with_loras,
        "edit": edit,
        "errors": read_errors,
        "async": generate_async,
    }.items():
        tell("huggingface_hub", operation, work)
