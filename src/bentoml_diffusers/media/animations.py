"""Videos as animated WebP and GIF, by Pillow; they have no sound."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.media.values import Video

_TICKS_MS = {"webp": 1, "gif": 10}  # what durations are multiples of
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "webp": {"quality": 90, "minimize_size": False},
    "gif": {"disposal": 1, "optimize": False},
}


def encode_animation(video: Video, file_format: str, arguments: Mapping[str, Any]) -> bytes:
    """Returns a video as an animated image that repeats for ever.

    Args:
        video: What to encode.
        file_format: ``"webp"`` or ``"gif"``; the second has 256 colors and at most 50 frames per
            second.
        arguments: More for Pillow's ``save``.
    """
    first, *others = video.images
    buffer = io.BytesIO()
    first.save(
        buffer,
        file_format.upper(),
        save_all=True,
        append_images=others,
        duration=_list_durations(len(video), video.fps, _TICKS_MS[file_format]),
        loop=0,
        **_OPTIONS[file_format],
        **arguments,
    )
    return buffer.getvalue()


def _list_durations(count: int, fps: float, tick_ms: int) -> list[int]:
    """Milliseconds of each frame, rounded so that no error adds up."""
    ends = [round((index + 1) * 1000 / fps / tick_ms) * tick_ms for index in range(count)]
    starts = [0, *ends[:-1]]
    return [max(end - start, 2 * tick_ms) for start, end in zip(starts, ends, strict=True)]
