"""What a request may choose that is not an argument of a pipeline: seed, scheduler, adapters."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from bentoml_diffusers.adapters.scales import read_scales
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.options import MAX_SEED
from bentoml_diffusers.serving.codecs import FORMATS_BY_KIND
from bentoml_diffusers.store import find_adapter
from bentoml_diffusers.tasks import ADAPTER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.serving.reader import RequestModel

AdapterKind = Literal["lora", "textual_inversion"]
ANSWER_FIELDS = ("n", "output_format", "previews")  # of a request: how to answer it
_MAX_SCALE = 10.0
_NUMBER = TypeAdapter(Annotated[float, Field(ge=-_MAX_SCALE, le=_MAX_SCALE)])


def _read_scale(value: Any) -> Any:
    """Not a union: its errors would name a field once for each of its types."""
    try:
        if isinstance(value, dict):
            return read_scales("scale", value, _MAX_SCALE)
        return _NUMBER.validate_python(value)
    except InvalidRequest as err:
        raise PydanticCustomError("scales", "{text}", {"text": str(err)}) from err
    except ValidationError as err:
        fault = err.errors(include_url=False)[0]
        raise PydanticCustomError("scale", "{text}", {"text": fault["msg"]}) from err


LoraScale = Annotated[
    Any,
    PlainValidator(_read_scale),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": -_MAX_SCALE, "maximum": _MAX_SCALE},
                {"type": "object"},
            ],
            "default": 1.0,
        }
    ),
]


class LoraChoice(BaseModel):
    """A LoRA by name, with its weight."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Tag in the model store, or file below lora_dir.")
    scale: LoraScale = Field(
        1.0,
        description="Weight; 1 is as trained, 0 is none. An object has one for each component or "
        'block, as diffusers takes it: {"unet": {"down": 0.3, "up": {"block_0": [1, 0.5]}}}.',
    )
    components: list[str] = Field(
        default_factory=list,
        max_length=2,
        description="Denoisers to load it into, where a model has two: transformer, transformer_2.",
    )


class InversionChoice(BaseModel):
    """A textual inversion by name, with the word for it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Tag in the model store, or file below lora_dir.")
    token: str | None = Field(
        None, min_length=1, max_length=64, description="Word in the prompt; by default the file's."
    )


def _as_choices(value: Any) -> Any:
    """A name, a mapping, or a list of either, as the engine takes them."""
    is_broken = isinstance(value, str) and value.lstrip().startswith(("[", "{"))  # JSON of a form
    items = [value] if isinstance(value, (str, dict)) and not is_broken else value
    if not isinstance(items, list):
        return value
    return [_as_choice(item) for item in items]


def _as_choice(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: value for key, value in item.items() if value is not None}
    return {"name": item.strip()} if isinstance(item, str) else item


def _draw_seed(seed: int | None) -> int | None:
    """-1 draws one, as in most APIs of this field."""
    return secrets.randbits(32) if seed == -1 else seed


def to_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request as arguments of an engine; ``None`` is left out."""
    arguments = {key: value for key, value in fields.items() if value is not None}
    for name in ANSWER_FIELDS:
        arguments.pop(name, None)
    for name in ADAPTER_OPTIONS.values():
        if name in arguments:
            arguments[name] = [choice.model_dump() for choice in arguments[name]]
    return arguments


Loras = Annotated[list[LoraChoice] | None, BeforeValidator(_as_choices)]
Inversions = Annotated[list[InversionChoice] | None, BeforeValidator(_as_choices)]


def add_choices(base: type[RequestModel], kind: str) -> type[RequestModel]:
    """Adds what a request may choose that is not an argument of a pipeline; keeps the name.

    Args:
        base: Has the fields of the pipeline.
        kind: Of the result: ``"image"``, ``"video"`` or ``"audio"``.
    """
    formats = FORMATS_BY_KIND[kind]

    class Base(base):  # type: ignore[misc, valid-type]
        seed: Annotated[int | None, AfterValidator(_draw_seed)] = Field(
            None,
            ge=-1,
            le=MAX_SEED,
            description="The same seed gives the same result; by default, or for -1, one is drawn.",
            examples=[7],
        )
        scheduler: str | None = Field(
            None,
            description="A scheduler that fits the model, by its name in diffusers or as a "
            "sampler such as 'DPM++ 2M Karras'.",
            examples=["Euler a"],
        )
        lora_weights: Loras = Field(
            None,
            max_length=16,
            description="LoRAs for this request only; a name stands for one with the scale 1.",
            examples=[[{"name": "outline", "scale": 0.8}]],
        )
        textual_inversions: Inversions = Field(
            None,
            max_length=16,
            description="Textual inversions for this request only; a name stands for one with the "
            "word of its file.",
            examples=[[{"name": "teal", "token": "<teal>"}]],
        )
        n: int = Field(
            1,
            ge=1,
            le=base.limits.max_images,
            description="Results; the seeds count up from `seed`, so each can be made again.",
            examples=[1],
        )
        output_format: Literal[formats] | None = Field(  # type: ignore[valid-type]
            None,
            description="Format of the files; by default the first of the header Accept that is "
            f"one of them, else {formats[0]}.",
            examples=[formats[0]],
        )
        previews: bool = Field(
            False,
            description="In an event stream: what the image looks like so far, as JPEG, at most "
            "twice a second.",
            examples=[False],
        )

    Base.__name__ = base.__name__
    Base.flags = base.flags | {"previews"}
    return Base


def pin_choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of fields, with each adapter of the store named by its version.

    Args:
        values: Of a request, as JSON.
    """
    kinds: dict[str, AdapterKind] = {
        "lora_weights": "lora",
        "textual_inversions": "textual_inversion",
    }
    pinned = dict(values)
    for name, kind in kinds.items():
        choices = _as_choices(values.get(name))
        if isinstance(choices, list):
            pinned[name] = [_pin_choice(one, kind) for one in choices]
    return pinned


def _pin_choice(choice: Any, kind: AdapterKind) -> Any:
    """A file below ``lora_dir`` has no version, and what is wrong is refused elsewhere."""
    if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
        return choice
    found = find_adapter(choice["name"], kind)
    return choice if found is None else {**choice, "name": found.tag}
