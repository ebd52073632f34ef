"""The name of what a class does that diffusers' auto pipelines do not know, by what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bentoml_diffusers.tasks.task import Task

_GUIDED_BY_IMAGES = ("ControlNet", "Adapter")  # their `image` says how, not what


def name_own_task(task: Task) -> str | None:
    """Returns the name of what a class does by itself; ``None`` if there is none for it.

    Args:
        task: Its ``__call__``.
    """
    names = {"video": _name_video, "audio": _name_audio, "image": _name_image}
    find = names.get(task.output.kind)
    return None if find is None else find(task)


def _name_video(task: Task) -> str:
    cls, video, image = task.pipeline_class.__name__, *map(task.inputs.get, ("video", "image"))
    if video is not None and ("VideoToVideo" in cls or video.is_required):
        return "video2video"
    if image is not None and ("ImageToVideo" in cls or image.is_required):
        return "img2video"
    return "txt2video" if _has_prompt(task) else "unconditional"


def _name_audio(task: Task) -> str:
    if any(item.kind == "audio" and item.is_required for item in task.inputs.values()):
        return "audio2audio"
    return "txt2audio" if _has_prompt(task) else "unconditional"


def _name_image(task: Task) -> str | None:
    cls, names = task.pipeline_class.__name__, set(task.inputs)
    if "Upscale" in cls:
        return "upscale"
    is_guided = any(word in cls for word in _GUIDED_BY_IMAGES)
    if {"image", "prompt"} <= names and not names & {"strength", "mask_image"} and not is_guided:
        return "edit"
    has_image = any(item.kind in ("image", "mask") for item in task.inputs.values())
    return None if has_image or _has_prompt(task) else "unconditional"


def _has_prompt(task: Task) -> bool:
    return any("prompt" in name for name in task.inputs)
