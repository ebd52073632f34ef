"""Preview images: what the latents of a running request show so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import latent_unpacker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline
    from PIL import Image


def generate_preview(
    view: DiffusionPipeline, step_output: Any, arguments: Mapping[str, Any]
) -> Image.Image | None:
    """Returns the first image of a request as it is after a step, through its autoencoder.

    Args:
        view: The pipeline of the request.
        step_output: What the scheduler returned. Where it holds the predicted clean sample, that
            is shown: it is recognisable much earlier than the noisy one.
        arguments: The request's arguments, for ``height`` and ``width``.

    Returns:
        ``None`` for a pipeline whose latents cannot be shown.
    """
    processor, vae = getattr(view, "image_processor", None), getattr(view, "vae", None)
    latents = _clean_sample(step_output)[:1]
    if processor is None or vae is None or not hasattr(vae.config, "scaling_factor"):
        return None
    unpack = latent_unpacker(view)
    if latents.ndim == 3 and unpack is not None:
        latents = unpack(latents, *_size_of(view, arguments), view.vae_scale_factor)
    if latents.ndim != 4:
        return None
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        pixels = vae.decode(
            (latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False
        )[0]
    image: Image.Image = processor.postprocess(pixels, output_type="pil")[0]
    return image


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
