"""What the services take: pydantic models with the limits of a service, and how they are read.

BentoML's own reading of requests fetches text in a file field as a URL, answers 500 to a broken
image, turns the prompt ``"12"`` of a form into a number, and ignores unknown fields.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import bentoml
from PIL.Image import Image as PILImage  # noqa: TC002 - pydantic reads the annotation
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from bentoml_diffusers.errors import UnreadableRequest, suggest
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.serving.codecs import (
    SIZE_STEP,
    OutputFormat,
    decode_base64,
    decode_image,
    decode_latents,
)
from bentoml_diffusers.workflow.bounds import count_marks

if TYPE_CHECKING:
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.types import Message


_MAX_MARKS = 2**20  # commas and brackets of a JSON body, those in its texts not counted
_MAX_FORM_MARKS = 2**16  # of a field of a form


class LoraChoice(BaseModel):
    """A LoRA by name, with its weight."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Tag in the model store, or file below lora_dir.")
    scale: float = Field(1.0, ge=-10, le=10, description="Weight; 1 is as trained, 0 is none.")


class InversionChoice(BaseModel):
    """A textual inversion by name, with the word for it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Tag in the model store, or file below lora_dir.")
    token: str | None = Field(
        None, min_length=1, max_length=64, description="Word in the prompt; by default the file's."
    )


@dataclass(frozen=True)
class Refusal:
    """Comes to an API in place of its fields, so that each error is answered at one place.

    BentoML itself would log a traceback for each bad request, and name no field in its text.
    """

    refusal: UnreadableRequest
    model_fields: ClassVar = ("refusal",)


class RequestModel(bentoml.IODescriptor):  # type: ignore[misc]
    """A request body, read strictly: JSON, or a form with files."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    limits: ClassVar[RequestLimits] = RequestLimits()
    flags: ClassVar[frozenset[str]] = frozenset()  # fields that are true or false

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read ``true`` as 1."""
        if isinstance(value, bool) and info.field_name not in cls.flags:
            raise PydanticCustomError("no_boolean", "Input should not be true or false")
        return value

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Any:
        """Reads a request; returns a :class:`Refusal` if something is wrong with it."""
        del serde
        try:
            return await cls._read(request)
        except ValidationError as err:
            return Refusal(UnreadableRequest([(one["loc"], one["msg"]) for one in err.errors()]))

    @classmethod
    async def _read(cls, request: Request) -> Self:
        request = cls._bound_body(request)
        media_type = request.headers.get("content-type", "").split(";")[0].strip()
        if media_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
            values = await cls._read_form(request)
        else:
            values = cls._read_json(await request.body())
        for name in values:
            cls._check_name(name)
        for name in cls.multipart_fields:
            if name in values:
                # Beside the event loop: large files take a while.
                values[name] = await asyncio.to_thread(cls._decode_file, name, values[name])
        model: Self = cls.model_validate(values)
        return model

    @classmethod
    async def _read_form(cls, request: Request) -> dict[str, Any]:
        from starlette.exceptions import HTTPException

        try:
            async with request.form() as form:
                return await cls._read_fields(form)
        except HTTPException as err:
            raise cls._fault("body", f"a broken form: {err.detail}") from err

    @classmethod
    async def _read_fields(cls, form: FormData) -> dict[str, Any]:
        from starlette.datastructures import UploadFile

        values: dict[str, Any] = {}
        for name, value in form.multi_items():
            cls._check_name(name)
            if name in values:
                raise cls._fault(name, "given more than once")
            if isinstance(value, UploadFile):
                if name not in cls.multipart_fields:
                    raise cls._fault(name, "a file, expected text")
                values[name] = await value.read()
            elif name in cls.multipart_fields:
                raise cls._fault(name, "text, expected an uploaded file")
            elif value != "":
                values[name] = _read_structure(value)
        return values

    @classmethod
    def _check_name(cls, name: str) -> None:
        if name not in cls.model_fields:
            raise cls._fault(name, f"an unknown field{suggest(name, cls.model_fields)}")

    @classmethod
    def _read_json(cls, body: bytes) -> dict[str, Any]:
        if count_marks(body) > _MAX_MARKS + len(cls.model_fields) * cls.limits.max_prompt_chars:
            raise cls._fault("body", "too many lists and objects")
        try:
            values = json.loads(body or b"{}")
        except (ValueError, RecursionError) as err:
            raise cls._fault("body", f"not JSON: {err}") from err
        if not isinstance(values, dict):
            raise cls._fault("body", f"got {type(values).__name__}, expected an object of fields")
        return values

    @classmethod
    def _bound_body(cls, request: Request) -> Request:
        """Returns the request with a body that ends in a fault where it gets too large."""
        from starlette.requests import Request as BoundedRequest

        most = cls._max_body_bytes()
        received = 0

        async def receive() -> Message:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > most:
                raise cls._fault("body", f"more than {most} bytes")
            return message

        return BoundedRequest(request.scope, receive)

    @classmethod
    def _max_body_bytes(cls) -> int:
        """Files as base64, texts as JSON with 12 characters for one, and room for the rest."""
        files = len(cls.multipart_fields) * cls.limits.max_upload_bytes * 4 // 3
        return files + len(cls.model_fields) * cls.limits.max_prompt_chars * 12 + 2**20

    @classmethod
    def _decode_file(cls, name: str, value: Any) -> Any:
        data = cls._read_file(name, value)
        try:
            return decode_image(data, cls.limits)
        except ValueError as err:
            raise cls._fault(name, str(err)) from err

    @classmethod
    def _read_file(cls, name: str, value: Any) -> bytes:
        """Returns the bytes of an uploaded file, or of one in base64."""
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise cls._fault(name, f"got {type(value).__name__}, expected a file")
        try:
            return decode_base64(value)
        except ValueError as err:
            raise cls._fault(name, str(err)) from err

    @classmethod
    def _fault(cls, name: str, text: str) -> ValidationError:
        error = PydanticCustomError("request", "{text}", {"text": text})
        details = [InitErrorDetails(type=error, loc=(name,), input=None)]
        return ValidationError.from_exception_data(cls.__name__, details)


def _read_structure(text: str) -> Any:
    """Forms carry lists and objects as JSON; all else stays text for pydantic to read."""
    if text[:1] in ("[", "{") and count_marks(text.encode()) <= _MAX_FORM_MARKS:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def make_txt2img_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of txt2img under the limits of a service."""
    side = Field(
        None,
        ge=SIZE_STEP,
        le=limits.max_side,
        multiple_of=SIZE_STEP,
        description=_SIZE,
        examples=[512],
    )

    class TextToImage(_make_base(limits)):  # type: ignore[misc]
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
            """Latents of 16 channels have a byte for each pixel; base64 adds a third."""
            without: int = super()._max_body_bytes()
            return without + limits.max_pixels * 4 // 3

    return TextToImage


def make_img2img_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of img2img under the limits of a service."""

    class ImageToImage(_make_base(limits)):  # type: ignore[misc]
        image: PILImage = Field(description="The picture to start from: a file, or base64.")
        strength: float = Field(
            0.8,
            gt=0,
            le=1,
            description="How much of the picture is painted anew; 1 keeps nothing.",
            examples=[0.6],
        )

    return ImageToImage


Latents = Annotated[Any, WithJsonSchema({"type": "file", "format": "binary", "title": "Latents"})]
_SIZE = "Pixels, a multiple of 8; by default the size that the model was trained for."


def _make_base(limits: RequestLimits) -> type[RequestModel]:
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
            25, ge=1, le=limits.max_steps, description="Denoising steps.", examples=[25]
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
        seed: int | None = Field(
            None,
            ge=0,
            le=2**32 - 1,
            description="The same seed paints the same picture; by default one is drawn.",
            examples=[7],
        )
        scheduler: str | None = Field(
            None,
            description="A scheduler that fits the model, by its name in diffusers or as a "
            "sampler such as 'DPM++ 2M Karras'.",
            examples=["Euler a"],
        )
        lora_weights: list[LoraChoice] | None = Field(
            None,
            max_length=16,
            description="LoRAs for this request only.",
            examples=[[{"name": "outline", "scale": 0.8}]],
        )
        textual_inversions: list[InversionChoice] | None = Field(
            None,
            max_length=16,
            description="Textual inversions for this request only.",
            examples=[[{"name": "teal", "token": "<teal>"}]],
        )
        output_format: OutputFormat = Field(
            "png", description="Format of the answer.", examples=["webp"]
        )

    Base.__name__ = base.__name__
    return Base
