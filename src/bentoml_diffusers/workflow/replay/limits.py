"""Checks an untrusted workflow against the limits of a service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidWorkflow
from bentoml_diffusers.workflow.files import KIND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.workflow.files import Workflow

_KINDS = ("image", "tuple", "dict", "float", "generator")  # latents could have any size
_MAX_NUMBER = 1024  # for any other argument: tokens, steps of a schedule, seconds
_MAX_SIZE = 16384  # for sizes that condition the model but are not generated
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size", "num_frames")
_USUAL_SIDE = 512
_IMAGES = ("image", "mask", "video", "audio")


def check_limits(workflow: Workflow, limits: RequestLimits, overrides: Mapping[str, Any]) -> None:
    """Applies the limits of a service's requests to a workflow.

    Sizes of its images are checked where they are decoded, names of adapters where they are
    looked up.

    Args:
        workflow: An untrusted workflow.
        limits: Limits of the service.
        overrides: Plain arguments instead of those of the workflow.

    Raises:
        InvalidWorkflow: 400, names the first argument beyond the limits.
    """
    arguments = {**workflow.arguments, **overrides}
    _check_number("num_inference_steps", arguments.get("num_inference_steps"), limits.max_steps)
    _check_number("height", arguments.get("height"), limits.max_side)
    _check_number("width", arguments.get("width"), limits.max_side)
    checked = {"num_inference_steps", "height", "width", "seed"}
    if arguments.get("height") and arguments.get("width"):
        checked.add("latents")  # the engine refuses those of another size
    for name, value in arguments.items():
        if name not in checked:
            _check_value(name, value, limits)
    _check_pixels(arguments, limits)
    for index, generator in enumerate(workflow.generators):
        if generator.state is not None:
            field = f"workflow.generators[{index}].state"
            raise InvalidWorkflow(field, "a state", "only a seed")


def _check_value(name: str, value: Any, limits: RequestLimits) -> None:
    if isinstance(value, str):
        if any(word in name for word in _IMAGES):  # some pipelines would open a file of that name
            raise InvalidWorkflow(_field(name), value, "an image")
        if len(value) > limits.max_prompt_chars:
            expected = f"at most {limits.max_prompt_chars} characters"
            raise InvalidWorkflow(_field(name), f"{len(value)} characters", expected)
    elif isinstance(value, list):
        if len(value) > limits.max_steps:
            expected = f"at most {limits.max_steps} entries"
            raise InvalidWorkflow(_field(name), f"{len(value)} entries", expected)
        for item in value:
            _check_value(name, item, limits)
    elif isinstance(value, dict):
        _check_kind(name, value, limits)
    else:
        _check_number(name, value, _MAX_SIZE if "size" in name else _MAX_NUMBER)


def _check_kind(name: str, value: Mapping[str, Any], limits: RequestLimits) -> None:
    kind = value.get(KIND)
    if kind is not None and kind not in _KINDS:
        raise InvalidWorkflow(_field(name), f"one {kind}", "plain values and images only")
    if kind in (None, "tuple", "dict"):
        for key, item in value.items():
            _check_value(name if key in (KIND, "items") else f"{name}.{key}", item, limits)


def _check_number(name: str, value: Any, limit: int) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not -limit <= value <= limit:
        raise InvalidWorkflow(_field(name), value, f"at most {limit}")


def _check_pixels(arguments: Mapping[str, Any], limits: RequestLimits) -> None:
    sides = (arguments.get(name) for name in ("height", "width"))
    height, width = (side if isinstance(side, int) else None for side in sides)
    prompt = arguments.get("prompt")
    count = len(prompt) if isinstance(prompt, list) else 1
    for name in _COUNTS:
        value = arguments.get(name)
        count *= value if isinstance(value, int) else 1
    if count > 1 or (height and width):
        height, width = height or _USUAL_SIDE, width or _USUAL_SIDE
        if height * width * count > limits.max_pixels:
            got, expected = f"{count} x {height} x {width} pixels", f"at most {limits.max_pixels}"
            raise InvalidWorkflow(_field("height"), got, expected)


def _field(name: str) -> str:
    return f"workflow.arguments.{name}"
