"""The image size of requests that do not set it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.tasks.task import Task

_USUAL_SIDE = 1024  # px, of families that do not define it, such as Z-Image


def default_size(pipeline: Any, task: Task) -> tuple[int, int]:
    """Returns height and width, in pixels, if a request gives neither.

    Args:
        pipeline: The pipeline.
        task: Its task.
    """
    own = model_size(pipeline) or (_USUAL_SIDE, _USUAL_SIDE)
    height, width = (
        side if isinstance(side, int) else fallback
        for side, fallback in zip((task.default("height"), task.default("width")), own, strict=True)
    )
    return height, width


def fit_area(task: Task, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with the area of the size that they give.

    Kontext scales a size to its ``max_area`` of a megapixel, unless that is the area of the size.
    """
    height, width = arguments.get("height"), arguments.get("width")
    is_free = "max_area" in task.inputs and not task.is_modular
    is_free = is_free and arguments.get("max_area") is None
    if not is_free or not isinstance(height, int) or not isinstance(width, int):
        return dict(arguments)
    return {**arguments, "max_area": height * width}


def complete_size(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with both height and width if one of them is present.

    Some pipelines of diffusers silently take their default size when either side is missing.
    """
    height, width = arguments.get("height"), arguments.get("width")
    size = model_size(pipeline)
    if (height is None) == (width is None) or size is None:
        return dict(arguments)
    return {**arguments, "height": height or size[0], "width": width or size[1]}


def model_size(pipeline: Any) -> tuple[int, int] | None:
    """Returns the height and width, in pixels, that a model was trained for, if it defines them."""
    modular = (getattr(pipeline, "default_height", None), getattr(pipeline, "default_width", None))
    if isinstance(modular[0], int) and isinstance(modular[1], int):
        return modular[0], modular[1]
    sample = getattr(pipeline, "default_sample_size", None) or _sample_size(pipeline)
    scale = getattr(pipeline, "vae_scale_factor", None)
    if scale is None or sample is None:
        return None
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    return height * scale, width * scale


def _sample_size(pipeline: Any) -> Any:
    """Returns the side of the latents, or height and width."""
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        sample = getattr(config, "sample_size", None)
        is_pair = isinstance(sample, (list, tuple)) and len(sample) == 2
        if isinstance(sample, int) or is_pair:
            return sample
    return None
