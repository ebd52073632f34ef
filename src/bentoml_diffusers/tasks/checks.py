"""Checks the arguments of a call before anything runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.tasks.hints import check_hints
from bentoml_diffusers.tasks.inputs import COUNTS_PER_PROMPT
from bentoml_diffusers.tasks.sizes import model_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.tasks.task import Task

_EMBEDDING_NDIM = 3
_WHOLE_NUMBERS = ("height", "width", "num_inference_steps", *COUNTS_PER_PROMPT)
_NUMBERS = ("guidance_scale", "strength", "eta", "guidance_rescale", "true_cfg_scale")


def count_images(arguments: Mapping[str, Any]) -> int:
    """Returns how many images, videos or sounds a request asks for."""
    prompt = arguments.get("prompt")
    embeds = arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    if embeds is not None:
        prompts = len(embeds)
    counts = (arguments.get(name) for name in COUNTS_PER_PROMPT)
    return prompts * int(next(filter(None, counts), 1))


def count_pixel_steps(
    pipeline: DiffusionPipeline, task: Task, arguments: Mapping[str, Any]
) -> tuple[int, int]:
    """Returns the pixel-steps (pixels times images) of one step, and of all steps of a request."""
    own = model_size(pipeline) or (1, 1)
    steps = arguments.get("num_inference_steps")
    if steps is None:
        steps = task.default("num_inference_steps")
    pixels = (arguments.get("height") or own[0]) * (arguments.get("width") or own[1])
    step = int(pixels) * count_images(arguments)
    return step, step * (steps if isinstance(steps, int) else 1)


def check_arguments(task: Task, arguments: Mapping[str, Any]) -> None:
    """Checks what diffusers' own checks leave out, in terms of the caller's fields.

    Raises:
        InvalidRequest: 400, names the first field that is wrong.
    """
    check_hints(task, arguments)
    if "prompt" in task.inputs and "prompt_embeds" in task.inputs:
        _check_prompt(arguments)
    for name in _WHOLE_NUMBERS:
        value = arguments.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InvalidRequest(name, value, "an integer")
        if value is not None and value < 1:
            raise InvalidRequest(name, value, "an integer from 1")
    for name in _NUMBERS:
        check_number(name, arguments.get(name))
    _check_embeddings(arguments)
    _check_images(task, arguments)


def check_clip_skip(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Checks that the text encoders have enough layers to skip.

    Raises:
        InvalidRequest: 400, they do not.
    """
    clip_skip = arguments.get("clip_skip")
    if clip_skip is None:
        return
    encoders: list[Any] = [
        getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")
    ]
    configs = [getattr(encoder, "config", None) for encoder in encoders]
    layers = [getattr(config, "num_hidden_layers", None) for config in configs]
    most = min((count for count in layers if count is not None), default=None)
    is_count = isinstance(clip_skip, int) and not isinstance(clip_skip, bool) and clip_skip >= 0
    if not is_count or (most is not None and clip_skip >= most):
        expected = "an integer from 0" if most is None else f"from 0 to {most - 1}"
        raise InvalidRequest("clip_skip", clip_skip, expected)


def with_rgb_images(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with PIL images as RGB: pipelines fail on other modes. Masks stay."""
    return {
        name: _to_rgb(value) if "image" in name and "mask" not in name else value
        for name, value in arguments.items()
    }


def _to_rgb(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_rgb(item) for item in value]
    is_other = isinstance(value, Image.Image) and value.mode != "RGB"
    return value.convert("RGB") if is_other else value


def _check_prompt(arguments: Mapping[str, Any]) -> None:
    prompt = arguments.get("prompt")
    if prompt is None:
        if arguments.get("prompt_embeds") is None:
            raise InvalidRequest("prompt", None, "text")
        return
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("prompt", prompt, "a string, or a list of strings")
    negative = arguments.get("negative_prompt")
    if isinstance(negative, list) and len(negative) != len(texts):
        raise InvalidRequest("negative_prompt", negative, f"one string, or {len(texts)} of them")


def _check_embeddings(arguments: Mapping[str, Any]) -> None:
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.ndim < _EMBEDDING_NDIM:
            expected = "a tensor of shape (prompts, tokens, width)"
            raise InvalidRequest(name, tuple(value.shape), expected)


def _check_images(task: Task, arguments: Mapping[str, Any]) -> None:
    """Checks the number of initial images: a single one, or one for each result."""
    for name in ("image", "mask_image", "control_image"):
        value = arguments.get(name)
        least = 2 if "mask" in name or isinstance(value, np.ndarray) else 3
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim < least:
            raise InvalidRequest(name, tuple(value.shape), "height, width and channels")
        if not isinstance(value, list):
            continue
        count = count_images(arguments)
        if not value:
            raise InvalidRequest(name, value, "an image")
        if name != "control_image" and "strength" in task.inputs and count % len(value):
            raise InvalidRequest(name, f"{len(value)} of them", f"one, or {count}, one per image")


def check_number(name: str, value: object) -> None:
    """Checks an argument that is a number, if it is present.

    Raises:
        InvalidRequest: 400, not a finite number.
    """
    if value is not None and not _is_finite(value):
        raise InvalidRequest(name, value, "a finite number")


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
