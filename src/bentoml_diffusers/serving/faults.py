"""What pydantic finds wrong in a request, in the words of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from bentoml_diffusers._names import suggest_field

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pydantic import ValidationError

    from bentoml_diffusers.errors import Faults

MAX_FAULTS = 32  # that an answer lists; each unknown field is one
UNKNOWN_FIELD = "an unknown field"  # with which a fault begins
MISSING_FIELD = "Field required"  # pydantic's


def list_faults(model: type[BaseModel], error: ValidationError) -> Faults:
    """Returns where a request is wrong and how, for an unknown field with its nearest name."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    faults = [(one["loc"], _describe(model, one)) for one in found[:MAX_FAULTS]]
    if len(found) > MAX_FAULTS:
        faults.append((("body",), "more is wrong than is listed here"))
    return faults


def _describe(model: type[BaseModel], fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"])
    place = fault["loc"]
    return f"{UNKNOWN_FIELD}{suggest_field(str(place[-1]), _known_at(model, place))}"


def _known_at(model: type[BaseModel], place: Sequence[str | int]) -> Collection[str]:
    """Returns the fields that there are beside an unknown one."""
    if len(place) == 1:
        return model.model_fields
    return next(_models_in(model.model_fields[str(place[0])].annotation), model).model_fields


def _models_in(annotation: Any) -> Any:
    """Yields the models in a type such as ``list[LoraChoice] | None``."""
    parts = get_args(annotation)  # on Python 3.10 `list[int]` is a type, too
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in parts:
        yield from _models_in(part)
