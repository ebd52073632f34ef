"""The fields of OpenAI's image requests: which mean something here, and what."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from bentoml_diffusers.serving.codecs import OutputFormat  # noqa: TC001 - pydantic reads it

MAX_IMAGES = 10  # of OpenAI's API
MAX_PARTIAL_IMAGES = 3
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]

# What a request may say and nothing here depends on, with the reason.
IGNORED = {
    "complexity": "a diffusion model does not plan its image",
    "input_fidelity": "say strength instead",
    "moderation": "a model has its own safety checker, or none",
    "safety_identifier": "it is sent back as it came",
    "style": "say it in the prompt",
    "user": "API keys say who asks",
}
# What would change the answer and cannot be done, with the reason.
REFUSED = {
    "frame_count": "no animations are made",
    "frame_duration_ms": "no animations are made",
    "markup": "say the change in the prompt, or mark it in a mask",
    "previews": "say partial_images",
    "svg": "no vector graphics are made",
}


def _refuse_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("no_boolean", "Input should not be true or false")
    return value


Count = Annotated[int, BeforeValidator(_refuse_booleans)]


def _unsupported(text: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", "{text}", {"text": text})


class ImageRequest(BaseModel):
    """What all requests for images share. Other fields are those of the native API."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    prompt: str | None = None
    model: str = Field("", max_length=1000)
    n: Count = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    quality: Quality = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_format: OutputFormat = "png"
    output_compression: Count = Field(100, ge=0, le=100)
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: Count = Field(0, ge=0, le=MAX_PARTIAL_IMAGES)
    safety_identifier: str | None = Field(None, max_length=1000)

    @field_validator("background", mode="before")
    @classmethod
    def _refuse_transparent(cls, value: Any) -> Any:
        if value == "transparent":
            raise _unsupported("this model makes opaque images only")
        return value

    @field_validator("output_format", mode="before")
    @classmethod
    def _refuse_format(cls, value: Any) -> Any:
        if value in ("gif", "svg"):
            raise _unsupported(f"no {value} is made; expected png, jpeg or webp")
        return "jpeg" if value == "jpg" else value

    @field_validator("response_format", mode="before")
    @classmethod
    def _refuse_url(cls, value: Any) -> Any:
        if value == "url":
            raise _unsupported("nothing is kept here to fetch by a URL; expected b64_json")
        return value

    @field_validator("output_compression")
    @classmethod
    def _refuse_lossy_png(cls, value: int, info: Any) -> int:
        if value < 100 and info.data.get("output_format") == "png":
            raise _unsupported("PNG is lossless; expected 100, or output_format jpeg or webp")
        return value

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height, px; ``None`` for ``auto``."""
        if self.size == "auto":
            return None
        width, height = map(int, self.size.split("x"))
        return width, height

    @property
    def compression(self) -> int | None:
        """Quality of a lossy format, 0 to 100; ``None`` for the usual one."""
        is_chosen = "output_compression" in self.model_fields_set
        return self.output_compression if is_chosen and self.output_format != "png" else None


class EditRequest(ImageRequest):
    """A request with an image: of ``/v1/images/edits`` and ``/v1/images/variations``.

    Attributes:
        image: The files; one, because no pipeline here takes more by this way.
        mask: A file whose transparent pixels are generated anew.
    """

    image: list[bytes] = Field(min_length=1)
    mask: bytes | None = None

    @field_validator("image", mode="before")
    @classmethod
    def _take_one(cls, value: Any) -> Any:
        files = value if isinstance(value, list) else [value]
        if len(files) > 1:
            raise _unsupported(f"{len(files)} images, expected one")
        return files
