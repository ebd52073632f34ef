"""One hash over the output of a pipeline: over pixels and numbers, not files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from bentoml_diffusers.workflow.files import Output, OutputPart

if TYPE_CHECKING:
    from collections.abc import Iterator


def hash_output(output: Any) -> Output:
    """Returns the hash over all images, tensors, arrays and plain values of an output.

    Args:
        output: A pipeline's output object, or its tuple.
    """
    digest = hashlib.sha256()
    parts: list[OutputPart] = []
    for leaf in _list_leaves(output):
        if isinstance(leaf, OutputPart):
            parts.append(leaf)
            digest.update(f"{leaf.kind}\0{leaf.shape}\0{leaf.sha256}\n".encode())
        else:
            digest.update(f"{leaf!r}\n".encode())
    return Output(sha256=digest.hexdigest(), parts=parts)


def _list_leaves(value: Any) -> Iterator[OutputPart | bool | int | float | str | None]:
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(getattr(value, "values", None), dict):  # the state of a modular pipeline
        value = value.values
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _list_leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _list_leaves(item)
    elif isinstance(value, Image.Image):
        yield _part(f"image {value.mode}", [value.height, value.width], value.tobytes())
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        numbers = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield _part(f"tensor {str(plain.dtype).removeprefix('torch.')}", list(plain.shape), numbers)
    elif isinstance(value, np.ndarray):
        yield _part(
            f"array {value.dtype}", list(value.shape), np.ascontiguousarray(value).tobytes()
        )
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield value


def _part(kind: str, shape: list[int], data: bytes) -> OutputPart:
    return OutputPart(kind=kind, shape=shape, sha256=hashlib.sha256(data).hexdigest())
