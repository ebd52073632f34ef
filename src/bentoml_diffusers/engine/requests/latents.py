"""Checks the latents of a request: pipelines accept any tensor, and fail deep inside."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.tasks.checks import count_images

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import DiffusionPipeline


_PACKED_NDIM = 3


def fit_latents(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Checks ``latents``, and casts them to the denoiser's dtype, which pipelines do not do.

    They must be finite floats, one entry per image, with the autoencoder's channels and the
    requested size. Checked are ``(images, channels, height, width)`` and, by the number of
    elements, the packed ``(images, tokens, channels)`` of Flux and similar. Other layouts are left
    to their pipelines.

    Raises:
        InvalidRequest: 400, not such a tensor.
    """
    import torch

    latents = arguments.get("latents")
    if latents is None:
        return dict(arguments)
    if not isinstance(latents, torch.Tensor):
        raise InvalidRequest("latents", type(latents).__name__, "a tensor of floats")
    expected = _expected_shape(pipeline, arguments)
    if expected is None:  # tokens, sound ...
        return dict(arguments)
    if latents.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InvalidRequest("latents", str(latents.dtype), "a tensor of floats")
    if not torch.isfinite(latents).all():
        raise InvalidRequest("latents", "NaN or infinity", "finite numbers")
    _check_shape(latents, expected)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    return {**arguments, "latents": latents.to(getattr(denoiser, "dtype", latents.dtype))}


def _check_shape(latents: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    if latents.ndim < _PACKED_NDIM:
        raise InvalidRequest("latents", tuple(latents.shape), "(images, channels, height, width)")
    if latents.ndim == 4:
        pairs = zip(latents.shape, expected, strict=True)
        fits = all(side is None or size == side for size, side in pairs)
    elif latents.ndim == 3 and None not in expected:
        count, channels, *sides = (side or 0 for side in expected)
        packed = [side // 2 * 2 for side in sides]  # two by two
        fits = latents.numel() == math.prod([count, channels, *packed])
    else:
        return
    if not fits:
        text = ", ".join("any" if side is None else str(side) for side in expected)
        how = ", packed" if latents.ndim == 3 else ""
        raise InvalidRequest("latents", tuple(latents.shape), f"shape ({text}){how}")


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
