"""Images from and to bytes."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.media import ANIMATIONS, FORMATS, AudioFormat, VideoFormat
from bentoml_diffusers.workflow.files import ImageFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from bentoml_diffusers.options import RequestLimits

OutputFormat = ImageFormat  # of images
# What each kind of result can be answered as; the first where a request says nothing.
FORMATS_BY_KIND: Mapping[str, tuple[str, ...]] = {
    "image": get_args(ImageFormat),
    "video": get_args(VideoFormat),
    "audio": get_args(AudioFormat),
}
ALL_FORMATS = tuple(dict.fromkeys(name for names in FORMATS_BY_KIND.values() for name in names))

_READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SIZE_STEP = 8  # pixels; sides of images are multiples of it


def choose_format(kind: str, asked: str | None, accept: str | None = None) -> str:
    """Returns the format of an answer.

    Args:
        kind: ``"image"``, ``"video"`` or ``"audio"``.
        asked: Of the request.
        accept: The header, which counts where the request says nothing: its first type that is
            known. Of none that is known the answer has the usual format of its kind.

    Raises:
        InvalidRequest: 400, a format of another kind.
    """
    known = FORMATS_BY_KIND[kind]
    if asked is None:
        wanted = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
        types = {media_type_of(kind, name): name for name in reversed(known)}
        return next((types[one] for one in wanted if one in types), known[0])
    if asked not in known:
        raise InvalidRequest("output_format", asked, f"one of {', '.join(known)}")
    return asked


def media_type_of(kind: str, name: str) -> str:
    """Returns the media type of a format."""
    if kind == "image":
        return f"image/{name}"
    return ANIMATIONS[name] if name in ANIMATIONS else FORMATS[name].media_type


def decode_image(data: bytes, limits: RequestLimits) -> Image.Image:
    """Decodes an uploaded image, upright, as RGB.

    Args:
        data: A file in a common format; its content counts, not its declared type.
        limits: Pixels are counted before they are decoded.

    Raises:
        ValueError: Not an image, broken, or beyond the limits; the text says which.
    """
    return _decode(data, limits, prepare_image)


def decode_transparency(data: bytes, limits: RequestLimits) -> Image.Image:
    """Decodes an uploaded image into a mask, RGB: white where it is transparent, else black.

    Raises:
        ValueError: As :func:`decode_image`, or an image without transparency.
    """

    def prepare(image: Image.Image, limits: RequestLimits) -> Image.Image:
        check_size(image.size, limits)
        if not image.has_transparency_data:
            raise ValueError("nothing in it is transparent, as what to generate should be")
        upright = ImageOps.exif_transpose(image).convert("RGBA")
        return ImageOps.invert(upright.getchannel("A")).convert("RGB")

    return _decode(data, limits, prepare)


def _decode(
    data: bytes,
    limits: RequestLimits,
    prepare: Callable[[Image.Image, RequestLimits], Image.Image],
) -> Image.Image:
    if len(data) > limits.max_upload_bytes:
        raise ValueError(f"{len(data)} bytes, expected at most {limits.max_upload_bytes}")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; our own limit is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_READABLE)
        return prepare(image, limits)
    except UnidentifiedImageError as err:
        raise ValueError(f"not an image in a known format ({', '.join(_READABLE)})") from err
    except Image.DecompressionBombError as err:  # its text tells Pillow's own limit
        raise ValueError(f"more pixels than are read, expected {_say_most(limits)}") from err
    except (OSError, SyntaxError, EOFError) as err:
        raise ValueError(f"a broken image: {err}") from err


def prepare_image(image: Image.Image, limits: RequestLimits) -> Image.Image:
    """Returns an image upright, as RGB.

    Raises:
        ValueError: Too small, or beyond the limits; the text says which.
    """
    check_size(image.size, limits)
    return ImageOps.exif_transpose(_with_bytes(image)).convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int], limits: RequestLimits) -> Image.Image:
    """Returns an image in another size, px: what of it does not fit the shape is cropped.

    Raises:
        ValueError: Too small, or beyond the limits; the text says which.
    """
    check_size(size, limits)
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _say_most(limits: RequestLimits) -> str:
    return f"at most {limits.max_side} per side and {limits.max_pixels} in all"


def _with_bytes(image: Image.Image) -> Image.Image:
    """Pillow cuts off what is beyond 8 bits where it converts an image of 16."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def check_size(size: tuple[int, int], limits: RequestLimits) -> None:
    """Checks width and height of an image, px.

    Raises:
        ValueError: Too small, or beyond the limits; the text says which.
    """
    width, height = size
    if min(size) < SIZE_STEP:
        raise ValueError(f"{width} x {height} pixels, expected at least {SIZE_STEP} per side")
    if max(size) > limits.max_side or width * height > limits.max_pixels:
        raise ValueError(f"{width} x {height} pixels, expected {_say_most(limits)}")


def decode_latents(text: object) -> torch.Tensor:
    """Decodes a safetensors file with one tensor, in base64; of a neighbour, a tensor.

    Raises:
        ValueError: No such file, or more or fewer tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if isinstance(text, torch.Tensor):
        return text
    try:
        tensors = load(decode_base64(text if isinstance(text, str) else ""))
    except SafetensorError as err:
        raise ValueError(f"no safetensors file: {err}") from err
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, expected one")
    return next(iter(tensors.values()))


def decode_base64(text: str) -> bytes:
    """Decodes base64, with or without ``data:image/...;base64,`` in front.

    White space is skipped: ``base64``, MIME and ``encodebytes`` break lines.

    Raises:
        ValueError: Not base64.
    """
    head, comma, rest = text.partition(",")
    encoded = rest if comma and head.lower().endswith("base64") else text
    try:
        return base64.b64decode(encoded.encode().translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError) as err:
        raise ValueError("neither an uploaded file nor one in base64") from err


def encode_image(
    image: Image.Image,
    output_format: OutputFormat,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    quality: int | None = None,
) -> bytes:
    """Encodes an image: PNG and its pixels exactly, JPEG and WebP at high quality.

    Args:
        image: What to encode.
        output_format: Into what.
        metadata: Arguments for Pillow's ``save`` that put texts into it.
        quality: Of JPEG and WebP, 0 to 100; ``None`` for the usual one.
    """
    buffer = io.BytesIO()
    opaque = image.convert("RGB") if output_format == "jpeg" else image
    chosen = dict(_QUALITY[output_format])
    if chosen and quality is not None:
        chosen["quality"] = quality
    opaque.save(buffer, output_format.upper(), **chosen, **metadata)
    return buffer.getvalue()


_QUALITY: Mapping[OutputFormat, Mapping[str, int]] = {
    "png": {},
    "jpeg": {"quality": 95},
    "webp": {"quality": 90},
}
