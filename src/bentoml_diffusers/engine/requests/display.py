"""Shows a result in a Python shell and in a notebook."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# A notebook stores what it shows, so this bounds what one result adds to its file.
MAX_IMAGES = 8
MAX_SIDE = 512  # pixels
MAX_NAMED = 4  # seeds, adapters or sizes


def describe_output(value: Any) -> str:
    """Describes an output, such as ``"2 images of 512x512"`` or ``"Tensor of 1x4x8x8"``."""
    images = find_images(value)
    if images:
        sizes = dict.fromkeys(f"{image.width}x{image.height}" for image in images)
        return f"{plural(len(images), 'image')} of {' and '.join(_shortened(sizes))}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of {'x'.join(map(str, shape))}"
    if isinstance(value, (list, tuple)) and value:
        return f"{len(value)} x {describe_output(value[0])}"
    return type(value).__name__


def images_as_html(images: Sequence[Image.Image], line: str) -> str:
    """Returns images as HTML, shrunk to :data:`MAX_SIDE`, with a line of text below."""
    shown = "".join(map(_image_as_html, images[:MAX_IMAGES]))
    more = f" ({MAX_IMAGES} of them shown)" if len(images) > MAX_IMAGES else ""
    return f"<div>{shown}</div><code>{html.escape(line + more)}</code>"


def find_images(value: Any) -> list[Image.Image]:
    """Returns the images of an output; empty if it is something else, such as latents."""
    if isinstance(value, (list, tuple)) and all(isinstance(one, Image.Image) for one in value):
        return list(value)
    return []


def _image_as_html(image: Image.Image) -> str:
    small = image.copy() if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/png;base64,{data}" {size} style="margin: 2px">'


def name_all(name: str, values: Sequence[object]) -> str:
    """Returns ``"seed 7"``, ``"seeds 7 8"``, or ``""`` for none; only the first few of many."""
    if not values:
        return ""
    label = name if len(values) == 1 else f"{name}s"
    return f"{label} {' '.join(_shortened(map(str, values)))}"


def _shortened(texts: Iterable[str]) -> list[str]:
    every, rest = list(texts), []
    if len(every) > MAX_NAMED:
        rest = [f"and {len(every) - MAX_NAMED} more"]
    return [*every[:MAX_NAMED], *rest]


def plural(count: int, name: str) -> str:
    """Returns ``"1 step"`` or ``"2 steps"``."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
