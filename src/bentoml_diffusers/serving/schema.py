"""What the services take: a pydantic model for each task, with the limits of a service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from bentoml_diffusers.serving.choices import add_choices
from bentoml_diffusers.serving.codecs import decode_latents
from bentoml_diffusers.serving.fields import make_field, why_left_out
from bentoml_diffusers.serving.reader import RequestModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image as PILImage

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Input, Task

_SIDES = ("height", "width")
Latents = Annotated[Any, WithJsonSchema({"type": "file", "format": "binary", "title": "Latents"})]
_LATENTS = Field(
    None,
    description="Noise to start from, of shape (1, channels, height / 8, width / 8): a safetensors "
    "file with one tensor, in base64. Give height and width beside it.",
)
_GUIDANCE = Field(
    None, ge=0, le=50, description="How closely to follow the prompt; by default the model's own."
)


def make_request_model(task: Task, limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of a task under the limits of a service.

    Args:
        task: The task.
        limits: Bounds of steps, sides, pixels and prompts; numbers about which nothing is known
            are between -1,000,000 and 1,000,000.

    Raises:
        InvalidOption: 400, what a request gets that leaves a field out is beyond the limits.
    """
    items = list(_list_served(task))
    title = "".join(part.capitalize() for part in task.name.strip("_").split("_"))
    fields: dict[str, Any] = {item.name: make_field(task, item, limits) for item in items}
    fields = dict(sorted(fields.items(), key=lambda pair: not pair[1][1].is_required()))
    if _takes_latents(task):  # behind the size, by which it is checked
        fields["latents"] = (Latents, _LATENTS)
    _check_default_size(fields, limits)
    if task.is_guided and "guidance_scale" not in fields:
        fields["guidance_scale"] = (float | None, _GUIDANCE)
    base = _make_base(title, limits, _choose_parts(task, fields))
    base.flags = frozenset(item.name for item in items if item.kind == "boolean")
    made = add_choices(create_model(title, __base__=base, **fields), task.output.kind)
    videos = [item.name for item in items if item.kind == "video"]
    made.video_fields = frozenset(videos)
    made.multipart_fields = [*made.multipart_fields, *videos]  # BentoML knows images and paths only
    return made


def _takes_latents(task: Task) -> bool:
    """Noise to start from is of the size that is asked for; an image would have its own."""
    names = set(task.inputs)
    return {*_SIDES, "latents"} <= names and "image" not in names and not task.is_modular


def _list_served(task: Task) -> Iterator[Input]:
    """Yields the inputs that a request can say; the size says the area of Kontext, too."""
    has_size = set(_SIDES) <= set(task.inputs) and not task.is_modular
    for item in task.inputs.values():
        if why_left_out(item) is None and not (has_size and item.name == "max_area"):
            yield item


def _check_default_size(fields: dict[str, Any], limits: RequestLimits) -> None:
    sides = [fields[name][1].default for name in _SIDES if name in fields]
    if len(sides) == len(_SIDES) and all(isinstance(side, int) for side in sides):
        limits.check_default_size(*sides)


def _choose_parts(task: Task, fields: dict[str, Any]) -> list[type]:
    """What is checked beyond single fields."""
    parts: list[type] = []
    if "latents" in fields:
        parts.append(_WithLatents)
    if {"image", "mask_image"} <= set(fields) and not task.is_modular:
        parts.append(_WithMask)
    return parts


def _make_base(title: str, limits: RequestLimits, parts: list[type]) -> type[RequestModel]:
    class Base(*parts, RequestModel):  # type: ignore[misc]
        # Inputs may be named `model_...`.
        model_config = ConfigDict(protected_namespaces=(), title=title)

        @model_validator(mode="after")
        def _check_pixels(self) -> Self:
            height, width = (getattr(self, name, None) for name in _SIDES)
            check_pixels(height, width, limits)
            return self

    Base.limits = limits
    found: type[RequestModel] = Base
    return found


class _WithLatents(RequestModel):
    """Noise that the caller brings."""

    base64_fields: ClassVar[frozenset[str]] = frozenset({"latents"})

    @field_validator("latents", check_fields=False)
    @classmethod
    def _decode_latents(cls, text: Any, info: ValidationInfo) -> Any:
        if text is not None and not all(info.data.get(name) for name in _SIDES):
            raise PydanticCustomError("no_size", "needs height and width beside it")
        try:
            return None if text is None else decode_latents(text)
        except ValueError as err:
            raise PydanticCustomError("latents", "{text}", {"text": str(err)}) from err

    @classmethod
    def _max_body_bytes(cls) -> int:
        """Latents of 16 channels have a byte for each pixel; base64 in lines adds a half."""
        without: int = super()._max_body_bytes()
        return without + cls.limits.max_pixels * 3 // 2


class _WithMask(RequestModel):
    """A mask over an image."""

    @field_validator("mask_image", check_fields=False)
    @classmethod
    def _check_mask(cls, mask: PILImage, info: ValidationInfo) -> PILImage:
        image = info.data.get("image")
        if image is not None and mask.size != image.size:
            sizes = {"mask": _say_size(mask), "image": _say_size(image)}
            raise PydanticCustomError("size", "{mask} pixels, but image is {image}", sizes)
        return mask

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        crop = getattr(self, "padding_mask_crop", None)
        mask, image = (getattr(self, name) for name in ("mask_image", "image"))
        if crop is not None and mask.getbbox() is None:
            raise PydanticCustomError("no_mask", "padding_mask_crop needs white in mask_image")
        height, width = (getattr(self, name, None) for name in _SIDES)
        check_pixels(height or image.height, width or image.width, self.limits)
        return self


def _say_size(image: PILImage) -> str:
    return f"{image.width} x {image.height}"


def check_pixels(height: int | None, width: int | None, limits: RequestLimits) -> None:
    """Raises pydantic's error for an image that is larger than a service allows."""
    if (height or 0) * (width or 0) > limits.max_pixels:
        raise PydanticCustomError(
            "too_many_pixels",
            "height x width should be at most {pixels} pixels",
            {"pixels": limits.max_pixels},
        )
