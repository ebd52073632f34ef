"""Splits a call that makes several images from one into a call for each of them.

Pipelines encode the image that they start from with the first generator only, and give the result
to all images: only the first one would be that of its seed. Separate calls give each image the
noise of its own seed, whatever the pipeline does.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from bentoml_diffusers.tasks.inputs import COUNTS_PER_PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A list of these applies to all images: one for each adapter, ControlNet, or frame.
_WHOLE = ("ip_adapter", "control", "video")


def split_by_image(arguments: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Returns the arguments of a call for each image; just the original if it must not be split.

    It is not split if it starts from no image, from as many as it makes, or if their assignment is
    unclear. Several videos of a prompt always are: many classes have the argument but ignore it
    and make one.

    Args:
        arguments: The arguments of the call, without generators.
        count: How many images it makes.
    """
    prompts = _count_prompts(arguments)
    inputs = {name: value for name, value in arguments.items() if _is_image_input(name, value)}
    given = max((_count_given(name, value) for name, value in inputs.items()), default=0)
    is_plain = (
        given == 1 or (given == prompts and prompts < count) or (prompts == 1 < given != count)
    )
    has_videos = (arguments.get("num_videos_per_prompt") or 1) > 1
    if count < 2 or count % prompts or not (is_plain or has_videos):
        return [dict(arguments)]
    return [
        {name: _part_of(name, value, image, prompts, count) for name, value in arguments.items()}
        for image in range(count)
    ]


def join_outputs(outputs: Sequence[Any]) -> Any:
    """Joins outputs to what one call for all images would have returned."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]  # their keys are never None
        parts = {name: [getattr(output, name) for output in outputs] for name in names}
        return type(first)(**{name: _join(values) for name, values in parts.items()})
    if isinstance(first, tuple):
        return tuple(_join(parts) for parts in zip(*outputs, strict=True))
    return _join(outputs)


def _join(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(list(parts))
    if isinstance(first, np.ndarray) and first.ndim:
        return np.concatenate(parts)
    return first


def _count_prompts(arguments: Mapping[str, Any]) -> int:
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if embeds is not None:
        return len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1


def _is_image_input(name: str, value: Any) -> bool:
    is_named = any(word in name for word in ("image", "mask", "video"))
    is_other = any(word in name for word in ("ip_adapter", "embeds", "attention"))
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return is_named and not is_other and isinstance(value, (Image.Image, np.ndarray, torch.Tensor))


def _count_given(name: str, value: Any) -> int:
    if any(word in name for word in _WHOLE):
        return 1
    if isinstance(value, (list, tuple)):
        return len(value)
    return 1 if isinstance(value, Image.Image) or value.ndim < 4 else len(value)


def _part_of(name: str, value: Any, image: int, prompts: int, count: int) -> Any:
    if name in COUNTS_PER_PROMPT and value is not None:
        return 1
    if name == "latents" and isinstance(value, torch.Tensor) and len(value) == count:
        return value[image : image + 1]
    is_each = "prompt" in name or "embeds" in name or "attention_mask" in name
    if prompts == 1 or not (is_each or _is_image_input(name, value)):
        return value
    if any(word in name for word in _WHOLE) or not _has_length(value, prompts):
        return value
    prompt = image // (count // prompts)
    return value[prompt] if isinstance(value, (list, tuple)) else value[prompt : prompt + 1]


def _has_length(value: Any, length: int) -> bool:
    is_array = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0
    return (is_array or isinstance(value, (list, tuple))) and len(value) == length
