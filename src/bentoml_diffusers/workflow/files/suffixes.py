"""The suffixes of files that can hold a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from bentoml_diffusers.media import ANIMATIONS, FORMATS
from bentoml_diffusers.workflow.files.containers import ImageFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGE_SUFFIXES: Mapping[str, ImageFormat] = {
    **{f".{name}": name for name in get_args(ImageFormat)},
    ".jpg": "jpeg",
}
RESULT_SUFFIXES = tuple(
    dict.fromkeys(
        (
            *IMAGE_SUFFIXES,
            *(f".{name}" for name in ANIMATIONS),
            *(suffix for found in FORMATS.values() for suffix in found.suffixes),
        )
    )
)
