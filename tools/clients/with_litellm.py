"""Operations of LiteLLM as a library, which is what its proxy calls."""

from __future__ import annotations

import io
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network

import litellm
from operations import check_image, make_photo, server, tell

TARGET = {"api_base": f"{server()}/v1", "api_key": "none"}
PROMPT = "a big red circle on a blue background at the left"


def generate() -> None:
    answer = litellm.image_generation(model="openai/demo", prompt=PROMPT, n=2, **TARGET)
    assert len({check_image(image.b64_json) for image in answer.data}) == 2


def generate_with_loras() -> None:
    answer = litellm.image_generation(
        model="openai/demo:outline", prompt=PROMPT, size="64x64", **TARGET
    )
    check_image(answer.data[0].b64_json)


def edit() -> None:
    photo = io.BytesIO(make_photo())
    photo.name = "photo.png"
    answer = litellm.image_edit(model="openai/demo", image=photo, prompt=PROMPT, **TARGET)
    check_image(answer.data[0].b64_json)


def read_errors() -> None:
    try:
        litellm.image_generation(model="openai/other", prompt=PROMPT, **TARGET)
    except litellm.exceptions.APIError as error:
        assert error.status_code == 404
    except litellm.NotFoundError as error:
        assert "not served here" in str(error)
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    for operation, work in {
        "generate": generate,
        "LoRA": generate_with_loras,
        "edit": edit,
        "errors": read_errors,
    }.items():
        tell("LiteLLM", operation, work)
