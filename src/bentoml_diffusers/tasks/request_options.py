"""The arguments of a request that are the engine's, defined once."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_Method = TypeVar("_Method", bound="Callable[..., Any]")
MAX_PRIORITY = 8


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request asks of the engine, beside the arguments of its pipeline.

    For options that affect the image, the field's metadata says where a workflow records them.

    Attributes:
        seed: 0 to 2**32 - 1; with several images the next ones count up from it, or one per
            image. ``None`` draws one. Each image is that of a lone run with its seed.
        scheduler: Scheduler for this request: a class, a name that diffusers exports, or a
            sampler's name such as ``"DPM++ 2M Karras"``.
        lora_weights: LoRAs for this request: a name, ``{"name": ..., "scale": ...}``, or a list of
            either.
        textual_inversions: Textual inversions for this request: a name,
            ``{"name": ..., "token": ...}``, or a list of either.
        exclusive: Run alone, which makes the image the same bit for bit whatever other requests
            there are. It waits for all that run before it, and all others wait for it.
        caller: Who sends the request, such as a user or an API key. Callers take turns, so none
            waits for another's whole backlog. Requests that name none count as one caller.
        priority: -8 to 8. Each level doubles the caller's share of the device; among the requests
            of one caller, those of a higher priority go first.
        timeout_s: Seconds, waiting included, after which the request is stopped; ``None`` takes
            that of the ``EngineLimits``.
        return_workflow: Record the request, so that ``Engine.replay`` can repeat it.
        keep_size: Answer in the size of ``image``, which is padded to what the pipeline takes, and
            cropped; else the pipeline chooses.
        preview_every: Steps between two previews of ``Engine.stream``; 0 for none.
        preview_count: Previews of ``Engine.stream``, spread over the steps, the first one after
            a tenth of them; 0 for none.
        preview_interval_s: Seconds between two previews, at least; alone, without
            ``preview_every`` and ``preview_count``, it asks for as many as that allows.
        preview_quality: ``"full"`` decodes previews by the autoencoder. ``"fast"`` shows coarse
            colours, also of videos, at next to no cost.
        on_step: Called with a ``Progress`` after each denoising step, in the thread of the request.
    """

    seed: int | list[int] | None = field(default=None, metadata={"place": "seeds"})
    scheduler: str | type[Any] | None = field(
        default=None, metadata={"place": "scheduler.requested"}
    )
    lora_weights: Any = field(default=None, metadata={"place": "adapters"})
    textual_inversions: Any = field(default=None, metadata={"place": "adapters"})
    exclusive: bool = False
    caller: str = ""
    priority: int = 0
    timeout_s: float | None = None
    return_workflow: bool = False
    keep_size: bool = field(default=False, metadata={"place": "keep_size"})
    preview_every: int = 0
    preview_count: int = 0
    preview_interval_s: float = 0.0
    preview_quality: Literal["full", "fast"] = "full"
    on_step: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        """Checks everything that can be checked without the pipeline."""
        value = self.timeout_s
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and value > 0):
            raise InvalidRequest("timeout_s", value, "a number of seconds above 0")
        if self.preview_quality not in ("full", "fast"):
            raise InvalidRequest("preview_quality", self.preview_quality, "'full' or 'fast'")
        if not isinstance(self.caller, str):
            raise InvalidRequest("caller", self.caller, "a string")
        level: object = self.priority
        is_integer = isinstance(level, int) and not isinstance(level, bool)
        if not (is_integer and -MAX_PRIORITY <= self.priority <= MAX_PRIORITY):
            expected = f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            raise InvalidRequest("priority", level, expected)

    @classmethod
    def split(
        cls, arguments: Mapping[str, Any], base: RequestOptions | None = None
    ) -> tuple[RequestOptions, dict[str, Any]]:
        """Splits the arguments of a request into options and all others.

        Args:
            arguments: By name.
            base: Options that those among the arguments override.

        Raises:
            InvalidRequest: 400, an option with an invalid value.
        """
        own = {name: value for name, value in arguments.items() if name in OPTION_NAMES}
        rest = {name: value for name, value in arguments.items() if name not in OPTION_NAMES}
        return dataclasses.replace(base or cls(), **own), rest


OPTION_NAMES = frozenset(item.name for item in dataclasses.fields(RequestOptions))
# Where a workflow records each option that affects the image.
OPTION_PLACES = {
    item.name: item.metadata["place"]
    for item in dataclasses.fields(RequestOptions)
    if "place" in item.metadata
}
# The options that name adapters, by kind of adapter.
ADAPTER_OPTIONS: Mapping[str, str] = {
    "lora": "lora_weights",
    "textual_inversion": "textual_inversions",
}


def shows_options(*classes: type[Any]) -> Callable[[_Method], _Method]:
    """Adds the fields of dataclasses to a method's keywords in ``help()`` and notebooks."""

    def decorate(method: _Method) -> _Method:
        signature = inspect.signature(method)
        items = list(signature.parameters.values())
        last = len(items) - (items[-1].kind is inspect.Parameter.VAR_KEYWORD)
        shown = [
            _parameter_of(item)
            for cls in classes
            for item in dataclasses.fields(cls)
            if item.name not in signature.parameters
        ]
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*items[:last], *shown, *items[last:]]
        )
        return method

    return decorate


def _parameter_of(item: dataclasses.Field[Any]) -> inspect.Parameter:
    default: Any = item.default
    if default is dataclasses.MISSING:
        make: Any = item.default_factory
        default = inspect.Parameter.empty if make is dataclasses.MISSING else make()
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(item.name, kind, default=default, annotation=item.type)
