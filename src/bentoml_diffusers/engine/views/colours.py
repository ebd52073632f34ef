"""Colours from latents by one small matrix: previews that cost nothing.

The mean colour of the pixels that one pixel of latents stands for is nearly a linear function of it
(https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204). Factors were
published for a few autoencoders; here they are fitted by least squares, on what the autoencoder
itself makes of a few images, once, when the first preview is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from diffusers import ModelMixin

_SIDE = 128  # pixels of the images that the factors are fitted on
_SOFT_CELLS = (2, 3, 4, 6, 8, 12, 16, 32)  # spots of colour per side of each of them
_FLAT_CELLS = (1, 1, 2, 2, 3, 4, 4, 8)
_RIDGE = 1e-3
_factors: Any = WeakTensorKeyDictionary()  # by a weight of the autoencoder, which views share


@dataclass(frozen=True)
class ColourFactors:
    """From latents to colours.

    Attributes:
        weight: Of shape (channels, 3), float32.
        bias: Of shape (3,).
        scale: Pixels per side for each one of the latents.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: int

    def show(self, latents: torch.Tensor) -> Image.Image:
        """Returns the image of latents, enlarged to its full size.

        Args:
            latents: As the autoencoder decodes them, of shape (channels, height, width).
        """
        values = latents.float().permute(1, 2, 0) @ self.weight + self.bias
        pixels = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        image = Image.fromarray(pixels)
        size = (image.width * self.scale, image.height * self.scale)
        return image.resize(size, Image.Resampling.BICUBIC)


def find_factors(vae: ModelMixin) -> ColourFactors | None:
    """Returns the factors of an autoencoder; ``None`` for one that encodes no images.

    The first call encodes 16 images of 128 x 128 pixels, which takes half as long as decoding one
    of 512 x 512.
    """
    key = next(vae.parameters())
    if key not in _factors:
        _factors[key] = _fit_factors(vae)
    found: ColourFactors | None = _factors[key]
    return found


def _fit_factors(vae: Any) -> ColourFactors | None:
    pixels = _make_images().to(vae.device)
    with torch.no_grad():
        try:
            latents = _encode(_in_full(vae), pixels)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None  # of sound, or for another count of channels
    if not torch.isfinite(latents).all():
        return None
    colours = interpolate(pixels, latents.shape[-2:], mode="area")
    inputs, outputs = (
        part.float().permute(0, 2, 3, 1).flatten(0, 2) for part in (latents, colours)
    )
    mean, centre = inputs.mean(0), outputs.mean(0)
    inputs, outputs = inputs - mean, outputs - centre
    ridge = _RIDGE * len(inputs) * inputs.var() * torch.eye(inputs.shape[1], device=inputs.device)
    weight = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ outputs)
    return ColourFactors(weight, centre - mean @ weight, _SIDE // latents.shape[-1])


def _list_pixels(images: torch.Tensor) -> torch.Tensor:
    """Returns shape (pixels, channels)."""
    return images.float().permute(0, 2, 3, 1).flatten(0, 2)


def _make_images() -> torch.Tensor:
    """Returns soft images and flat shapes of all colours, of shape (16, 3, side, side)."""
    noise = torch.Generator().manual_seed(0)
    size = (_SIDE, _SIDE)
    soft = [
        interpolate(torch.randn(1, 3, cells, cells, generator=noise), size, mode="bicubic")
        for cells in _SOFT_CELLS
    ]
    flat = [
        interpolate(3 * torch.randn(1, 3, cells, cells, generator=noise), size, mode="nearest")
        for cells in _FLAT_CELLS
    ]
    return torch.cat([*soft, *flat]).tanh()


def _in_full(vae: Any) -> Any:
    """Returns the autoencoder, or a copy in float32 of one that overflows in float16."""
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return vae
    copy = type(vae).from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    return copy.to(vae.device, torch.float32).eval()


def _encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Returns latents of shape (images, channels, height, width)."""
    given = pixels.to(vae.dtype)
    try:
        output = vae.encode(given)
    except (RuntimeError, ValueError):  # of videos
        output = vae.encode(given[:, :, None])
    spread = getattr(output, "latent_dist", None)
    latents: torch.Tensor = output.latents if spread is None else spread.mode()
    return latents[:, :, 0] if latents.ndim == 5 else latents
