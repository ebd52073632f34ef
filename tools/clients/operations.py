"""Runs operations of a client and tells what became of them, a line of JSON for each.

Only Python's own library and Pillow: it is imported by the environment of the clients.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import traceback
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = 64


def tell(client: str, operation: str, work: Callable[[], Any]) -> None:
    """Runs an operation; a failure is told, too."""
    try:
        work()
        fault = ""
    except Exception:  # noqa: BLE001 - the edge of the process: the caller shows it
        fault = traceback.format_exc()
    print(json.dumps({"client": client, "operation": operation, "fault": fault}), flush=True)


def server() -> str:
    """Returns the address of the server: the argument of the script."""
    return sys.argv[1]


def open_text(text: str | None) -> Image.Image:
    """Opens an image in base64."""
    assert text
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def check_image(text: str | None, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """Checks the size of an image, and that it is not of one colour; returns its pixels."""
    image = open_text(text)
    assert image.size == size, image.size
    assert len(image.getcolors(SIDE * SIDE) or ()) != 1
    return image.tobytes()


def make_photo() -> bytes:
    """Makes an image to start from, PNG."""
    return _encode(Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB"))


def make_mask() -> bytes:
    """Makes a mask whose left half is transparent, PNG."""
    mask = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    return _encode(mask)


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
