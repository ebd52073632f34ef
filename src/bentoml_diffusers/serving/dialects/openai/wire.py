"""Answers and events in OpenAI's form."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.serving.event_streams import format_event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bentoml_diffusers.serving.dialects.openai.fields import ImageRequest

# Nothing is counted in tokens here; clients need the numbers to be there.
_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def describe_images(
    request: ImageRequest,
    files: Sequence[bytes],
    size: tuple[int, int],
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns the answer to a request.

    Args:
        request: What was asked.
        files: The images, encoded.
        size: Of each of them, px.
        seeds: Of each of them; an addition of ours.
    """
    data: list[dict[str, Any]] = [{"b64_json": _encode(file)} for file in files]
    for entry, seed in zip(data, seeds, strict=False):
        entry["seed"] = seed
    return {"created": int(time.time()), "data": data, **_describe(request, size), "usage": _USAGE}


def partial_event(
    kind: str, request: ImageRequest, file: bytes, size: tuple[int, int], index: int
) -> bytes:
    """Returns an event with a partial image.

    Args:
        kind: ``"image_generation"`` or ``"image_edit"``.
        request: What was asked.
        file: The image, encoded.
        size: Of it, px.
        index: How many there were before it.
    """
    return _event(f"{kind}.partial_image", request, file, size, {"partial_image_index": index})


def completed_event(
    kind: str, request: ImageRequest, file: bytes, size: tuple[int, int], **more: Any
) -> bytes:
    """Returns the event with a final image; for the arguments see :func:`partial_event`."""
    return _event(f"{kind}.completed", request, file, size, {"usage": _USAGE, **more})


def error_event(error: Mapping[str, Any]) -> bytes:
    """Returns the event that ends a stream without an image."""
    return format_event("error", {"type": "error", "error": error})


def _event(
    name: str,
    request: ImageRequest,
    file: bytes,
    size: tuple[int, int],
    more: Mapping[str, Any],
) -> bytes:
    body = {
        "type": name,
        "b64_json": _encode(file),
        "created_at": int(time.time()),
        **_describe(request, size),
        **more,
    }
    return format_event(name, body)


def _describe(request: ImageRequest, size: tuple[int, int]) -> dict[str, Any]:
    said = {
        "size": f"{size[0]}x{size[1]}",
        "quality": request.quality,
        "background": "opaque",
        "output_format": request.output_format,
    }
    caller = request.safety_identifier
    return said if caller is None else {**said, "safety_identifier": caller}


def _encode(file: bytes) -> str:
    return base64.b64encode(file).decode()
