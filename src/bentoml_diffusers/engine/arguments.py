"""Checks the arguments of a call before anything runs; reads errors of diffusers' own checks."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from bentoml_diffusers._names import suggest_field
from bentoml_diffusers.engine.sizes import model_size
from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import DiffusionPipeline, SchedulerMixin

    from bentoml_diffusers.loading.blocks import ModularWorkflow

# In `**kwargs` of diffusers' own pipelines only these mean something.
_LEGACY_KEYWORDS = frozenset({"callback", "callback_steps"})
_NO_DEFAULT = inspect.Parameter.empty
_WHOLE_NUMBERS = ("height", "width", "num_inference_steps", "num_images_per_prompt", "batch_size")
_NUMBERS = ("guidance_scale", "strength", "eta", "guidance_rescale", "true_cfg_scale")


@dataclass(frozen=True)
class Parameters:
    """What a method takes.

    Attributes:
        defaults: Each named parameter with its default; ``inspect.Parameter.empty`` for none.
        open_names: Names taken beside them.
        takes_all: Any other name is taken as well.
        guided: ``guidance_scale`` is for the guider of a modular pipeline.
        modular: The modular workflow that runs, of a modular pipeline.
    """

    defaults: Mapping[str, Any]
    open_names: frozenset[str] = frozenset()
    takes_all: bool = False
    guided: bool = False
    modular: ModularWorkflow | None = None

    def takes(self, name: str) -> bool:
        """True if an argument can have this name."""
        return name in self.defaults or name in self.open_names or self.takes_all

    def complete(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments with the defaults of all others."""
        return {
            **{key: value for key, value in self.defaults.items() if value is not _NO_DEFAULT},
            **arguments,
        }


def read_modular_parameters(pipeline: Any, workflow: ModularWorkflow) -> Parameters:
    """Returns what a modular workflow of a pipeline takes."""
    inputs = {name: item.default for name, item in workflow.inputs.items()}
    guided = "guidance_scale" not in inputs and _has_guidance_scale(pipeline)
    return Parameters({**inputs, "output": None}, guided=guided, modular=workflow)


def read_parameters(cls: type[Any], method_name: str) -> Parameters:
    """Returns what a method of a pipeline takes."""
    method = getattr(cls, method_name)
    items = list(inspect.signature(method).parameters.values())[1:]
    named = {
        item.name: item.default
        for item in items
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    if not any(item.kind is item.VAR_KEYWORD for item in items):
        return Parameters(named)
    is_diffusers = getattr(method, "__module__", "").startswith("diffusers.")
    return Parameters(named, _LEGACY_KEYWORDS, takes_all=not is_diffusers)


def _has_guidance_scale(pipeline: Any) -> bool:
    guider = getattr(pipeline, "guider", None)
    return "guidance_scale" in getattr(guider, "config", {})


def has_method(cls: type[Any], name: str) -> bool:
    """True if ``cls`` defines the method; every class seems to have ``__call__`` otherwise."""
    return any(name in vars(base) for base in cls.__mro__)


def bind_arguments(
    parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments by name.

    Raises:
        InvalidRequest: 400, an argument that the method does not have.
    """
    named = list(parameters.defaults)
    if len(args) > len(named):
        raise InvalidRequest("arguments", len(args), f"at most {len(named)} positional ones")
    bound = dict(zip(named, args, strict=False))
    for name, value in kwargs.items():
        if name in bound:
            raise InvalidRequest(name, value, "each argument once")
        if not parameters.takes(name):
            raise InvalidRequest(
                name, value, f"a known argument{suggest_field(name, named)}: {', '.join(named)}"
            )
        bound[name] = value
    return bound


def count_images(arguments: Mapping[str, Any]) -> int:
    """Returns how many pictures a request asks for."""
    prompt = arguments.get("prompt")
    embeds = arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    if embeds is not None:
        prompts = len(embeds)
    per_prompt = arguments.get("num_images_per_prompt") or arguments.get("batch_size") or 1
    return prompts * int(per_prompt)


def count_pixel_steps(
    pipeline: DiffusionPipeline, parameters: Parameters, arguments: Mapping[str, Any]
) -> int:
    """Returns the size of a request's work: pixels times images times steps."""
    own = model_size(pipeline) or (1, 1)
    steps = arguments.get("num_inference_steps")
    if steps is None:
        steps = parameters.defaults.get("num_inference_steps", 1)
    pixels = (arguments.get("height") or own[0]) * (arguments.get("width") or own[1])
    return int(pixels) * count_images(arguments) * (steps if isinstance(steps, int) else 1)


def check_arguments(
    parameters: Parameters, arguments: Mapping[str, Any], scheduler: SchedulerMixin | None
) -> None:
    """Checks what the checks of diffusers leave out, in terms of the caller's fields.

    Raises:
        InvalidRequest: 400, names the first field that is wrong.
    """
    named = parameters.defaults
    if "prompt" in named and "prompt_embeds" in named:
        _check_prompt(arguments)
    for name in _WHOLE_NUMBERS:
        value = arguments.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InvalidRequest(name, value, "a whole number")
        if value is not None and value < 1:
            raise InvalidRequest(name, value, "a whole number from 1")
    for name in _NUMBERS:
        check_number(name, arguments.get(name))
    _check_steps(named, arguments, scheduler)


def check_clip_skip(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Checks that the text encoders have a layer that many before their last.

    Raises:
        InvalidRequest: 400, they have not.
    """
    clip_skip = arguments.get("clip_skip")
    if clip_skip is None:
        return
    encoders: list[Any] = [
        getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")
    ]
    configs = [getattr(encoder, "config", None) for encoder in encoders]
    layers = [getattr(config, "num_hidden_layers", None) for config in configs]
    most = min((count for count in layers if count is not None), default=None)
    is_count = isinstance(clip_skip, int) and not isinstance(clip_skip, bool) and clip_skip >= 0
    if not is_count or (most is not None and clip_skip >= most):
        expected = "a whole number from 0" if most is None else f"from 0 to {most - 1}"
        raise InvalidRequest("clip_skip", clip_skip, expected)


def with_rgb_images(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with PIL pictures as RGB: pipelines fail on other modes. Masks stay."""
    return {
        name: _to_rgb(value) if "image" in name and "mask" not in name else value
        for name, value in arguments.items()
    }


def _to_rgb(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_rgb(item) for item in value]
    is_other = isinstance(value, Image.Image) and value.mode != "RGB"
    return value.convert("RGB") if is_other else value


def invalid_request_from(error: BaseException) -> InvalidRequest | None:
    """Returns the caller's fault if ``error`` came out of a pipeline's ``check_inputs``."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "check_inputs":
            field = re.search(r"`(\w+)`", str(error))
            invalid = InvalidRequest(field.group(1) if field else "arguments", "", "")
            invalid.args = (str(error),)
            invalid.message = str(error)
            return invalid
        trace = trace.tb_next
    return None


def _check_prompt(arguments: Mapping[str, Any]) -> None:
    prompt = arguments.get("prompt")
    if prompt is None:
        if arguments.get("prompt_embeds") is None:
            raise InvalidRequest("prompt", None, "text")
        return
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("prompt", prompt, "text, or a list of texts")


def _check_steps(
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any],
    scheduler: SchedulerMixin | None,
) -> None:
    steps = arguments.get("num_inference_steps")
    limit = _most_steps(scheduler)
    if steps is not None and limit is not None and steps > limit:
        raise InvalidRequest("num_inference_steps", steps, f"from 1 to {limit}")
    strength = arguments.get("strength")
    if strength is None and arguments.get("image") is not None:
        strength = defaults.get("strength")
    if not isinstance(strength, (int, float)) or arguments.get("denoising_start") is not None:
        return
    if not 0 < strength <= 1:
        raise InvalidRequest("strength", strength, "above 0, up to 1")
    if steps is None:
        steps = defaults.get("num_inference_steps")
    if isinstance(steps, int) and int(steps * strength) < 1:
        raise InvalidRequest(
            "strength", strength, f"at least {1 / steps:.3g} with {steps} num_inference_steps"
        )


def _most_steps(scheduler: SchedulerMixin | None) -> int | None:
    """A flow may be cut into any number of steps, however many it was trained with."""
    config = getattr(scheduler, "config", None)
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    if is_flow or getattr(config, "use_flow_sigmas", False):
        return None
    return getattr(config, "num_train_timesteps", None)


def check_number(name: str, value: object) -> None:
    """Checks an argument that is a number, where it is given.

    Raises:
        InvalidRequest: 400, not a finite number.
    """
    if value is not None and not _is_finite(value):
        raise InvalidRequest(name, value, "a finite number")


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
