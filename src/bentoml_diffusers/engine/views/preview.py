"""Preview images: the current latents of a running request, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import latent_unpacker
from bentoml_diffusers.engine.views.colours import find_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline
    from PIL import Image


def generate_preview(
    view: DiffusionPipeline,
    step_output: Any,
    arguments: Mapping[str, Any],
    *,
    is_full: bool = True,
) -> Image.Image | None:
    """Returns the first image of a request as it is after a step.

    Args:
        view: The pipeline of the request.
        step_output: What the scheduler returned. If it has the predicted clean sample, that is
            decoded: it is recognisable much earlier than the noisy one.
        arguments: The request's arguments, for ``height`` and ``width``.
        is_full: Through the autoencoder, as it would be at the end; else coarse, by colours
            alone, at next to no cost.

    Returns:
        ``None`` for a pipeline whose latents cannot be decoded.
    """
    processor, vae = getattr(view, "image_processor", None), getattr(view, "vae", None)
    latents = _clean_sample(step_output)[:1]
    if vae is None:
        return None
    unpack = latent_unpacker(view)
    if latents.ndim == 3 and unpack is not None:
        latents = unpack(latents, *_size_of(view, arguments), view.vae_scale_factor)
    if not is_full:
        return _show_colours(vae, latents)
    if latents.ndim != 4 or processor is None or not hasattr(vae.config, "scaling_factor"):
        return None
    with torch.no_grad():
        pixels = vae.decode(_denormalise(vae, latents).to(vae.dtype), return_dict=False)[0]
    image: Image.Image = processor.postprocess(pixels, output_type="pil")[0]
    return image


def _show_colours(vae: Any, latents: torch.Tensor) -> Image.Image | None:
    """Of a video the frame in the middle."""
    if latents.ndim not in (4, 5):
        return None
    factors = find_factors(vae)
    if factors is None or latents.shape[1] != len(factors.weight):
        return None
    own = _denormalise(vae, latents)[0]
    return factors.show(own[:, own.shape[1] // 2] if own.ndim == 4 else own)


def _denormalise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Returns latents as the autoencoder decodes them: the pipelines' own last lines."""
    config = vae.config
    scaled = latents / (getattr(config, "scaling_factor", None) or 1.0)
    mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return scaled + (getattr(config, "shift_factor", None) or 0.0)
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (torch.as_tensor(part).to(latents).view(shape) for part in (mean, std))
    return scaled * std + mean


def _clean_sample(step_output: Any) -> torch.Tensor:
    if isinstance(step_output, tuple):
        is_pair = len(step_output) > 1 and isinstance(step_output[1], torch.Tensor)
        found: torch.Tensor = step_output[1] if is_pair else step_output[0]
        return found
    clean = getattr(step_output, "pred_original_sample", None)
    noisy: torch.Tensor = step_output.prev_sample
    return noisy if clean is None else clean


def _size_of(view: DiffusionPipeline, arguments: Mapping[str, Any]) -> tuple[int, int]:
    default = view.default_sample_size * view.vae_scale_factor
    return arguments.get("height") or default, arguments.get("width") or default
