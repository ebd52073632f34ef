"""One input of a task as a field of a request: its type, default, bounds and meaning.

Left out is what no client should say: tensors, dtypes, options of diffusers' own code, and how many
images; a service makes one for each request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from PIL.Image import Image as PILImage
from pydantic import Field, WithJsonSchema

from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.serving.codecs import SIZE_STEP
from bentoml_diffusers.serving.frames import FRAME_INPUTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Input, Kind, Task

_NOT_FOR_CLIENTS = frozenset(
    {
        "batch_size",
        "callback_steps",
        "clean_caption",
        "crops_coords",
        "num_images_per_prompt",
        "num_videos_per_prompt",
        "num_waveforms_per_prompt",
        "output_type",
        "resized_image",
        "return_dict",
    }
)
_USUAL_STEPS = 50  # of blocks that have no default
_FAR = 1_000_000  # bound of numbers about which nothing is known
_IMAGES = ("image", "mask")
_DURATIONS = (
    *("audio_length_in_s", "audio_end_in_s", "audio_start_in_s"),
    *("audio_duration", "audio_duration_s", "duration"),
)
_TYPES: Mapping[Kind, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "image": PILImage,
    "mask": PILImage,
    "video": Annotated[Any, WithJsonSchema({"type": "file", "format": "binary"})],
    "pair": Annotated[
        list[Annotated[int, Field(ge=0, le=2**14)]], Field(min_length=2, max_length=2)
    ],
}


def why_left_out(item: Input) -> str | None:
    """Returns why a request has no field for an input; ``None`` if it has one."""
    if item.kind == "generator":
        return "a request has a seed"
    if item.kind not in _TYPES:
        return f"no request can carry it: {item.kind}"
    if item.name in _NOT_FOR_CLIENTS or item.name.startswith("_"):
        return "not for clients"
    return None


def make_field(task: Task, item: Input, limits: RequestLimits) -> tuple[Any, FieldInfo]:
    """Returns the annotation of an input's field, and the field.

    Raises:
        InvalidOption: 400, a default beyond the limits of the service.
    """
    default = _choose_default(task, item, limits)
    bounds = dict(_find_bounds(item, limits))
    if "le" in bounds and isinstance(default, (int, float)):
        bounds["le"] = max(bounds["le"], default)  # what the class itself says is in order
    annotation = _TYPES[item.kind]
    if default is None and item.kind not in _IMAGES:  # BentoML's images are in no union
        annotation = annotation | None
    example = _EXAMPLES.get(item.name, default if default is not ... else None)
    return annotation, Field(
        default,
        description=_describe(task, item, limits),
        examples=None if example is None else [example],
        **bounds,
    )


def _is_needed(task: Task, item: Input) -> bool:
    """A prompt is: embeddings, which a caller in Python may give instead, no request can carry.

    So are frames where only the loaded model knows how many are usual: they have limits.
    """
    if item.name in FRAME_INPUTS and item.default is None:
        return True
    has_prompt = not task.is_modular and item.name == "prompt" and item.kind == "string"
    return item.is_required or (has_prompt and item.default is None)


def _choose_default(task: Task, item: Input, limits: RequestLimits) -> Any:
    """Returns what a request gets that leaves an input out; an ellipsis if it must not.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    if item.name == "num_inference_steps":
        return choose_steps(limits, item.default or _USUAL_STEPS)
    if _is_needed(task, item):
        return ...
    default = item.default
    side = limits.default_side
    if item.name in ("height", "width", "resolution", "output_resolution"):
        default = (None if _starts_from_image(task) else side) or default
        limits.check_default_size(default or 1, 1)
    if item.name == "max_area" and default is not None:
        default = side**2 if side else default
        limits.check_default_size(math.isqrt(default), math.isqrt(default))
    if item.name in FRAME_INPUTS and isinstance(default, int) and default > limits.max_frames:
        expected = f"at least {default}, the frames of a request that gives none"
        raise InvalidOption("max_frames", limits.max_frames, expected)
    if item.name == "strength" and default is not None:
        return default if _leaves_a_step(task, default, limits) else ...
    return list(default) if isinstance(default, tuple) else default


def _starts_from_image(task: Task) -> bool:
    """The size of such a request is that of its image."""
    return not task.is_modular and any(
        item.kind == "image" and item.is_required for item in task.inputs.values()
    )


def _leaves_a_step(task: Task, strength: float, limits: RequestLimits) -> bool:
    steps = choose_steps(limits, task.default("num_inference_steps") or _USUAL_STEPS)
    return int(strength * steps) >= 1


def choose_steps(limits: RequestLimits, usual: int) -> int:
    """Returns the steps of a request that gives none.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    steps = limits.default_steps or usual
    limits.check_default_steps(steps)
    return steps


def _find_bounds(item: Input, limits: RequestLimits) -> dict[str, Any]:
    if item.kind == "string":
        is_prompt = item.is_required or item.name == "prompt"
        whole = {"min_length": 1, "pattern": r"\S"} if is_prompt else {}
        return {"max_length": limits.max_prompt_chars, **whole}
    if item.kind not in ("integer", "number"):
        return {}
    side = {"ge": SIZE_STEP, "le": limits.max_side}
    known: dict[str, dict[str, Any]] = {
        "num_inference_steps": {"ge": 1, "le": limits.max_steps},
        "height": {**side, "multiple_of": SIZE_STEP},
        "width": {**side, "multiple_of": SIZE_STEP},
        "resolution": side,
        "output_resolution": side,
        "max_area": {"ge": SIZE_STEP**2, "le": limits.max_pixels},
        "padding_mask_crop": {"ge": 0, "le": limits.max_side},
        "strength": {"gt": 0, "le": 1},
        **{name: {"ge": 1, "le": limits.max_frames} for name in FRAME_INPUTS},
        **{name: {"ge": 0, "le": limits.max_seconds} for name in _DURATIONS},
        **_BOUNDS,
    }
    return known.get(item.name, {"ge": -_FAR, "le": _FAR})


_SHARE = {"ge": 0, "le": 1}
_WEIGHT = {"ge": 0, "le": 10}
_GUIDANCE_RANGE = {"ge": 0, "le": 50}
_COUNT = {"ge": 0, "le": 32}
_TOKENS = {"ge": 1, "le": 8192}
_SPEED = {"ge": 1, "le": 120}
_BOUNDS: Mapping[str, dict[str, Any]] = {
    "eta": _SHARE,
    "denoising_start": _SHARE,
    "denoising_end": _SHARE,
    "control_guidance_start": _SHARE,
    "control_guidance_end": _SHARE,
    "conditioning_scale": _WEIGHT,
    "controlnet_conditioning_scale": _WEIGHT,
    "aesthetic_score": _WEIGHT,
    "negative_aesthetic_score": _WEIGHT,
    "guidance_scale": _GUIDANCE_RANGE,
    "true_cfg_scale": _GUIDANCE_RANGE,
    "clip_skip": _COUNT,
    "control_mode": _COUNT,
    "layers": {"ge": 1, "le": 16},
    "max_sequence_length": _TOKENS,
    "max_new_tokens": _TOKENS,
    "guidance_rescale": _SHARE,
    "image_guidance_scale": _GUIDANCE_RANGE,
    "frame_rate": _SPEED,
    "fps": _SPEED,
    "target_fps": _SPEED,
    "motion_bucket_id": {"ge": 0, "le": 255},
    "noise_aug_strength": _SHARE,
    "decode_chunk_size": {"ge": 1, "le": 1024},
}


def _describe(task: Task, item: Input, limits: RequestLimits) -> str:
    if item.name in ("height", "width"):
        own = "the size that the model was trained for"
        usual = "that of `image`, of any number" if _starts_from_image(task) else own
        return f"Pixels, a multiple of {SIZE_STEP}; by default {limits.default_side or usual}."
    ours = _MEANINGS.get(item.name)
    theirs = item.description or ours or "See the pipeline of this model."
    return theirs if task.is_modular else ours or theirs


_EXAMPLES: Mapping[str, Any] = {
    "prompt": "a big red circle on a blue background at the left",
    "negative_prompt": "blurred",
    "height": 512,
    "width": 512,
    "strength": 0.6,
    "padding_mask_crop": 32,
}
_MEANINGS: Mapping[str, str] = {
    "prompt": "What to generate.",
    "prompt_2": "The same for the second text encoder; by default the prompt.",
    "prompt_3": "The same for the third text encoder; by default the prompt.",
    "negative_prompt": "What not to generate.",
    "negative_prompt_2": "The same for the second text encoder.",
    "negative_prompt_3": "The same for the third text encoder.",
    "image": "The image to start from: a file, or base64.",
    "video": "The video to start from: an MP4 or WebM file, or base64.",
    "mask_image": "White where to generate, black where to keep: a file, or base64.",
    "control_image": "The image that guides the ControlNet: a file, or base64.",
    "control_mode": "Kind of control, counted from 0.",
    "ip_adapter_image": "The image whose look is taken over: a file, or base64.",
    "height": "Pixels, a multiple of 8.",
    "width": "Pixels, a multiple of 8.",
    "num_inference_steps": "Denoising steps.",
    "strength": "How much of the image is regenerated; 1 keeps nothing.",
    "guidance_scale": "How closely to follow the prompt.",
    "controlnet_conditioning_scale": "Weight of the ControlNet.",
    "control_guidance_start": "Share of the steps after which the ControlNet begins.",
    "control_guidance_end": "Share of the steps after which the ControlNet ends.",
    "guess_mode": "Let the ControlNet work without a prompt.",
    "clip_skip": "Layers at the end of the text encoder that are left out.",
    "padding_mask_crop": "Pixels around the mask that are cropped and generated larger.",
    "denoising_start": "Share of the steps that another model has done.",
    "denoising_end": "Share of the steps after which to stop.",
    "eta": "Noise that DDIM adds at each step.",
    "original_size": "Height and width that the image is said to come from, px.",
    "target_size": "Height and width that the image is said to have, px.",
    "crops_coords_top_left": "Where the image is said to be cropped: top, left, px.",
    "negative_original_size": "As original_size, for what not to generate.",
    "negative_target_size": "As target_size, for what not to generate.",
    "negative_crops_coords_top_left": "As crops_coords_top_left, for what not to generate.",
    "aesthetic_score": "Score that the image is said to have.",
    "negative_aesthetic_score": "Score of what not to generate.",
    "max_sequence_length": "Longest prompt in tokens.",
    "num_frames": "Frames of the video.",
    "frame_rate": "Frames per second.",
    "true_cfg_scale": "How closely to follow the prompt; takes effect with a negative_prompt.",
    "image_guidance_scale": "How closely to follow the image.",
}
