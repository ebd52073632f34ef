"""What a service takes for a modular workflow: a request model made from the blocks' inputs.

Left out is what no client should say: tensors, dtypes, options of diffusers' own code, and how
many pictures; a service paints one for each request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from PIL.Image import Image as PILImage
from pydantic import ConfigDict, Field, create_model, model_validator
from typing_extensions import Self

from bentoml_diffusers.serving.codecs import SIZE_STEP
from bentoml_diffusers.serving.reading import RequestModel
from bentoml_diffusers.serving.schema import add_choices, check_pixels, choose_steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Input, Kind, Task

_NOT_FOR_CLIENTS = frozenset(
    {
        "batch_size",
        "crops_coords",
        "num_images_per_prompt",
        "num_videos_per_prompt",
        "output_type",
        "resized_image",
    }
)
_USUAL_STEPS = 50  # of blocks that have no default
_FAR = 1_000_000  # bound of numbers about which nothing is known
_IMAGES = ("image", "mask")
_TYPES: Mapping[Kind, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "image": PILImage,
    "mask": PILImage,
    "pair": Annotated[
        list[Annotated[int, Field(ge=0, le=2**14)]], Field(min_length=2, max_length=2)
    ],
}


def make_modular_model(workflow: Task, limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of a modular workflow under the limits of a service.

    Args:
        workflow: The modular workflow.
        limits: Bounds of steps, sides, pixels and prompts; numbers about which nothing is known
            are between -1,000,000 and 1,000,000.
    """
    served = sorted(
        (item for item in workflow.inputs.values() if why_left_out(item) is None),
        key=lambda item: not item.is_required,
    )

    title = "".join(part.capitalize() for part in workflow.name.strip("_").split("_"))

    class Modular(RequestModel):
        # Inputs may be named `model_...`.
        model_config = ConfigDict(protected_namespaces=(), title=title)

        @model_validator(mode="after")
        def _check_pixels(self) -> Self:
            check_pixels(getattr(self, "height", None), getattr(self, "width", None), limits)
            return self

    Modular.limits = limits
    Modular.flags = frozenset(item.name for item in served if item.kind == "boolean")
    fields: dict[str, Any] = {item.name: _make_field(item, limits) for item in served}
    sides = [fields[name][1].default for name in ("height", "width") if name in fields]
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        limits.check_default_size(*sides)
    if workflow.is_guided and "guidance_scale" not in fields:
        fields["guidance_scale"] = (float | None, _GUIDANCE)
    return add_choices(create_model(title, __base__=Modular, **fields))


def why_left_out(item: Input) -> str | None:
    """Returns why a request has no field for an input; ``None`` if it has one."""
    if item.kind == "generator":
        return "a request has a seed"
    if item.kind in ("tensor", "structure", "other", "video", "audio"):
        return f"no request can carry it: {item.kind}"
    if item.name in _NOT_FOR_CLIENTS or item.name.startswith("_"):
        return "not for clients"
    return None


_GUIDANCE = Field(
    None, ge=0, le=50, description="How closely to follow the prompt; by default the model's own."
)


def _make_field(item: Input, limits: RequestLimits) -> tuple[Any, FieldInfo]:
    default = _choose_default(item, limits)
    bounds = dict(_find_bounds(item, limits))
    if "le" in bounds and isinstance(default, (int, float)):
        bounds["le"] = max(bounds["le"], default)  # what the blocks say themselves is in order
    annotation = _TYPES[item.kind]
    if not item.is_required and item.kind not in _IMAGES:  # BentoML's images are in no union
        annotation = annotation | None
    return annotation, Field(
        ... if item.is_required else default,
        description=item.description or _MEANINGS.get(item.name, "See the blocks of this model."),
        **bounds,
    )


def _find_bounds(item: Input, limits: RequestLimits) -> dict[str, Any]:
    if item.kind == "string":
        whole = {"min_length": 1, "pattern": r"\S"} if item.is_required else {}
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
        **_BOUNDS,
    }
    return known.get(item.name, {"ge": -_FAR, "le": _FAR})


_SHARE = {"ge": 0, "le": 1}
_WEIGHT = {"ge": 0, "le": 10}
_GUIDANCE_RANGE = {"ge": 0, "le": 50}
_COUNT = {"ge": 0, "le": 32}
_TOKENS = {"ge": 1, "le": 8192}
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
}


def _choose_default(item: Input, limits: RequestLimits) -> Any:
    """Returns what a request gets that leaves an input out.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    default = item.default
    if item.name == "num_inference_steps" and not item.is_required:
        return choose_steps(limits, default or _USUAL_STEPS)
    side = limits.default_side
    if item.name in ("height", "width", "resolution", "output_resolution"):
        default = side or default
        limits.check_default_size(default or 1, 1)
    if item.name == "max_area" and default is not None:
        default = side**2 if side else default
        limits.check_default_size(math.isqrt(default), math.isqrt(default))
    return list(default) if isinstance(default, tuple) else default


_MEANINGS: Mapping[str, str] = {
    "prompt": "What to paint.",
    "prompt_2": "The same for the second text encoder; by default the prompt.",
    "prompt_3": "The same for the third text encoder; by default the prompt.",
    "negative_prompt": "What not to paint.",
    "negative_prompt_2": "The same for the second text encoder.",
    "negative_prompt_3": "The same for the third text encoder.",
    "image": "The picture to start from: a file, or base64.",
    "mask_image": "What to paint anew is white: a file, or base64.",
    "control_image": "The picture that guides the ControlNet: a file, or base64.",
    "control_mode": "Kind of control, counted from 0.",
    "ip_adapter_image": "The picture whose look is taken over: a file, or base64.",
    "height": "Pixels, a multiple of 8.",
    "width": "Pixels, a multiple of 8.",
    "num_inference_steps": "Denoising steps.",
    "strength": "How much of the picture is painted anew; 1 keeps nothing.",
    "guidance_scale": "How closely to follow the prompt.",
    "controlnet_conditioning_scale": "Weight of the ControlNet.",
    "control_guidance_start": "Share of the steps after which the ControlNet begins.",
    "control_guidance_end": "Share of the steps after which the ControlNet ends.",
    "guess_mode": "Let the ControlNet work without a prompt.",
    "clip_skip": "Layers at the end of the text encoder that are left out.",
    "padding_mask_crop": "Pixels around the mask that are cropped and painted larger.",
    "denoising_start": "Share of the steps that another model has done.",
    "denoising_end": "Share of the steps after which to stop.",
    "eta": "Noise that DDIM adds at each step.",
    "original_size": "Height and width that the picture is said to come from, px.",
    "target_size": "Height and width that the picture is said to have, px.",
    "crops_coords_top_left": "Where the picture is said to be cropped: top, left, px.",
    "negative_original_size": "As original_size, for what not to paint.",
    "negative_target_size": "As target_size, for what not to paint.",
    "negative_crops_coords_top_left": "As crops_coords_top_left, for what not to paint.",
    "aesthetic_score": "Score that the picture is said to have.",
    "negative_aesthetic_score": "Score of what not to paint.",
    "max_sequence_length": "Longest prompt in tokens.",
}
