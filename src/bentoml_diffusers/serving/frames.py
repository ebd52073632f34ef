"""The frames of a request for a video, under the limits of a service; only the model knows all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.tasks.sizes import default_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.engine import Engine
    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Task

FRAME_INPUTS = ("num_frames", "frames")
# How many frames one frame of the latents stands for, as the pipelines call it.
_STEPS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def check_frames(
    engine: Engine, task: str, limits: RequestLimits, arguments: Mapping[str, Any]
) -> None:
    """Checks how many frames a request asks for: with what it leaves out, and by the autoencoder.

    Raises:
        InvalidRequest: 400, more than the limits allow, or a number that the model would change.
    """
    found = engine.find_task(task)
    name = next((one for one in FRAME_INPUTS if one in found.inputs), None)
    if name is None or found.output.kind != "video":
        return
    default = found.default(name)
    frames = arguments.get(name, default)
    if not isinstance(frames, int):
        return
    _check_step(engine.pipeline, name, frames, default)
    height, width = _find_size(engine, found, arguments)
    most = limits.max_pixel_frames // (height * width)
    if frames > most:
        expected = f"at most {most} frames of {width} x {height} pixels"
        raise InvalidRequest(name, frames, expected)


def _find_size(engine: Engine, task: Task, arguments: Mapping[str, Any]) -> tuple[int, int]:
    height, width = default_size(engine.pipeline, task)
    return arguments.get("height") or height, arguments.get("width") or width


def _check_step(pipeline: Any, name: str, frames: int, default: Any) -> None:
    """Pipelines take the next lower number, which some say in their log.

    Most have one frame, and then as many for each of the latents; those whose default is a multiple
    have no frame of its own.
    """
    steps = (getattr(pipeline, one, None) for one in _STEPS)
    step = next((one for one in steps if isinstance(one, int)), 1)
    first = 0 if isinstance(default, int) and default % step == 0 else 1
    if step > 1 and frames != default and (frames - first) % step:
        lower = max((frames - first) // step * step + first, first or step)
        near = f"{lower} or {lower + step}"
        plus = "1 plus " if first else ""
        raise InvalidRequest(name, frames, f"{plus}a multiple of {step}, such as {near}")
