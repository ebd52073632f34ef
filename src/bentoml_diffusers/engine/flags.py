"""The results of a safety checker for the images of a request."""

from __future__ import annotations

from typing import Any

_NAMES = ("nsfw_content_detected", "nsfw_detected")


def read_flags(pipeline: Any, output: Any) -> tuple[bool, ...]:
    """Returns one flag for each image; empty if nothing was checked.

    Args:
        pipeline: The pipeline that ran.
        output: What it returned: an output of diffusers, or a tuple for ``return_dict=False``.
    """
    found = next((getattr(output, name) for name in _NAMES if hasattr(output, name)), None)
    is_checked = getattr(pipeline, "safety_checker", None) is not None
    if is_checked and isinstance(output, tuple) and len(output) > 1:
        found = output[1]
    if not isinstance(found, (list, tuple)):
        return ()
    return tuple(bool(flag) for flag in found)


def warn_of_flags(flags: tuple[bool, ...]) -> tuple[str, ...]:
    """Returns a warning for each image that the safety checker blacked out."""
    return tuple(
        f"image {number}: the safety checker flagged it and blacked it out; "
        "try another prompt or seed"
        for number, flag in enumerate(flags, 1)
        if flag
    )
