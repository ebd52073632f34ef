"""What the services take: pydantic models with the limits of a service."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from PIL.Image import Image as PILImage  # noqa: TC002 - pydantic reads the annotation
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from bentoml_diffusers.adapters.scales import read_scales
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.serving.codecs import SIZE_STEP, OutputFormat, decode_latents
from bentoml_diffusers.serving.reading import RequestModel

if TYPE_CHECKING:
    from bentoml_diffusers.options import RequestLimits


_STEPS = 25  # of a request to a classic pipeline that gives none


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


Loras = Annotated[list[LoraChoice] | None, BeforeValidator(_as_choices)]
Inversions = Annotated[list[InversionChoice] | None, BeforeValidator(_as_choices)]


def make_txt2img_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of txt2img under the limits of a service."""
    side = _make_side(limits, "the size that the model was trained for", limits.default_side)

    class TextToImage(_make_base(limits)):  # type: ignore[misc]
        base64_fields: ClassVar[frozenset[str]] = frozenset({"latents"})

        height: int | None = side
        width: int | None = side
        latents: Latents = Field(
            None,
            description="Noise to start from, of shape (1, channels, height / 8, width / 8): a "
            "safetensors file with one tensor, in base64. Give height and width beside it.",
        )

        @model_validator(mode="after")
        def _check_pixels(self) -> Self:
            check_pixels(self.height, self.width, limits)
            return self

        @field_validator("latents")
        @classmethod
        def _decode_latents(cls, text: Any, info: ValidationInfo) -> Any:
            if text is not None and not (info.data.get("height") and info.data.get("width")):
                raise PydanticCustomError("no_size", "needs height and width beside it")
            try:
                return None if text is None else decode_latents(text)
            except ValueError as err:
                raise PydanticCustomError("latents", "{text}", {"text": str(err)}) from err

        @classmethod
        def _max_body_bytes(cls) -> int:
            """Latents of 16 channels have a byte for each pixel; base64 in lines adds a half."""
            without: int = super()._max_body_bytes()
            return without + limits.max_pixels * 3 // 2

    return TextToImage


def make_img2img_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of img2img under the limits of a service."""

    class ImageToImage(_make_base(limits)):  # type: ignore[misc]
        image: PILImage = Field(description="The picture to start from: a file, or base64.")
        strength: float = _make_strength(limits, 0.8, "the picture", 0.6)

    return ImageToImage


def make_inpaint_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of inpaint under the limits of a service."""
    side = _make_side(limits, "that of `image`, of any number")

    class Inpaint(make_img2img_model(limits)):  # type: ignore[misc]
        image: PILImage = Field(description="The picture to change: a file, or base64.")
        mask_image: PILImage = Field(
            description="What is painted anew is white, what stays is black; as large as `image`."
        )
        strength: float = _make_strength(limits, 1.0, "the picture below the mask", 0.9)
        padding_mask_crop: int | None = Field(
            None,
            ge=0,
            le=limits.max_side,
            description="Paint only the part of the picture around the mask, with this many pixels "
            "beside it, and paste it back: what is black in the mask stays to the pixel. A large "
            "number takes the whole picture.",
            examples=[32],
        )
        height: int | None = side
        width: int | None = side

        @field_validator("mask_image")
        @classmethod
        def _check_mask(cls, mask: PILImage, info: ValidationInfo) -> PILImage:
            image = info.data.get("image")
            if image is not None and mask.size != image.size:
                sizes = {"mask": _say_size(mask), "image": _say_size(image)}
                raise PydanticCustomError("size", "{mask} pixels, but image is {image}", sizes)
            return mask

        @model_validator(mode="after")
        def _check_crop(self) -> Self:
            if self.padding_mask_crop is not None and self.mask_image.getbbox() is None:
                raise PydanticCustomError("no_mask", "padding_mask_crop needs white in mask_image")
            width, height = self.image.size
            check_pixels(self.height or height, self.width or width, limits)
            return self

    return Inpaint


def _make_strength(limits: RequestLimits, default: float, what: str, example: float) -> Any:
    """Without a default where it would leave none of the default steps."""
    text = f"How much of {what} is painted anew; 1 keeps nothing."
    is_usable = int(default * choose_steps(limits, _STEPS)) >= 1
    value = default if is_usable else ...
    return Field(value, gt=0, le=1, description=text, examples=[example])


def _say_size(picture: PILImage) -> str:
    return f"{picture.width} x {picture.height}"


def _make_side(limits: RequestLimits, text: str, default: int | None = None) -> Any:
    return Field(
        default,
        ge=SIZE_STEP,
        le=limits.max_side,
        multiple_of=SIZE_STEP,
        description=f"Pixels, a multiple of {SIZE_STEP}; by default {default or text}.",
        examples=[512],
    )


Latents = Annotated[Any, WithJsonSchema({"type": "file", "format": "binary", "title": "Latents"})]


def _make_base(limits: RequestLimits) -> type[RequestModel]:
    steps = choose_steps(limits, _STEPS)

    class Prompted(RequestModel):
        prompt: str = Field(
            min_length=1,
            max_length=limits.max_prompt_chars,
            pattern=r"\S",
            description="What to paint.",
            examples=["a big red circle on a blue background at the left"],
        )
        negative_prompt: str = Field(
            "",
            max_length=limits.max_prompt_chars,
            description="What not to paint.",
            examples=["blurred"],
        )
        num_inference_steps: int = Field(
            steps, ge=1, le=limits.max_steps, description="Denoising steps.", examples=[steps]
        )
        guidance_scale: float = Field(
            5.0,
            ge=0,
            le=50,
            description="How closely to follow the prompt; up to 1 is off.",
            examples=[5.0],
        )

    Prompted.limits = limits
    return add_choices(Prompted)


def choose_steps(limits: RequestLimits, usual: int) -> int:
    """Returns the steps of a request that gives none.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    steps = limits.default_steps or usual
    limits.check_default_steps(steps)
    return steps


def check_pixels(height: int | None, width: int | None, limits: RequestLimits) -> None:
    """Raises pydantic's error for a picture that is larger than a service allows."""
    if (height or 0) * (width or 0) > limits.max_pixels:
        raise PydanticCustomError(
            "too_many_pixels",
            "height x width should be at most {pixels} pixels",
            {"pixels": limits.max_pixels},
        )


def add_choices(base: type[RequestModel]) -> type[RequestModel]:
    """Adds what a request may choose that is no argument of a pipeline; keeps the name."""

    class Base(base):  # type: ignore[misc, valid-type]
        seed: Annotated[int | None, AfterValidator(_draw_seed)] = Field(
            None,
            ge=-1,
            le=2**32 - 1,
            description="The same seed paints the same picture; by default, or for -1, one is "
            "drawn.",
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
        output_format: OutputFormat = Field(
            "png", description="Format of the answer.", examples=["webp"]
        )

    Base.__name__ = base.__name__
    return Base
