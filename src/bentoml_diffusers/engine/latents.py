"""Checks latents that a request brings: pipelines take any, and fail far inside."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.arguments import count_images
from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline


def check_latents(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Checks ``latents``: finite floats; one per image, the autoencoder's channels, the size asked.

    Checked are ``(images, channels, height, width)`` and, by their count of numbers, the packed
    ``(images, tokens, channels)`` of Flux and its like. Other layouts are their pipelines' own.

    Raises:
        InvalidRequest: 400, not such a tensor.
    """
    import torch

    latents = arguments.get("latents")
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        raise InvalidRequest("latents", type(latents).__name__, "a tensor of floats")
    if not torch.isfinite(latents).all():
        raise InvalidRequest("latents", "NaN or infinity", "finite numbers")
    expected = _expected_shape(pipeline, arguments)
    if expected is None or latents.ndim not in (3, 4):
        return
    if latents.ndim == 4:
        pairs = zip(latents.shape, expected, strict=True)
        fits = all(side is None or size == side for size, side in pairs)
    else:
        fits = None in expected or latents.numel() == math.prod(filter(None, expected))
    if not fits:
        text = ", ".join("any" if side is None else str(side) for side in expected)
        packed = ", packed" if latents.ndim == 3 else ""
        raise InvalidRequest("latents", tuple(latents.shape), f"shape ({text}){packed}")


def _expected_shape(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Any]
) -> tuple[int | None, ...] | None:
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    channels = getattr(config, "latent_channels", None)
    scale = getattr(pipeline, "vae_scale_factor", None)
    if channels is None or not scale:
        return None
    height, width = arguments.get("height"), arguments.get("width")
    return (
        count_images(arguments),
        channels,
        height // scale if height else None,
        width // scale if width else None,
    )
