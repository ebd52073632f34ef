"""How the body of a request is read: strictly, from JSON or a form, within bounds.

BentoML's own reading of requests fetches text in a file field as a URL, answers 500 to a broken
image, turns the prompt ``"12"`` of a form into a number, and ignores unknown fields.
"""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import bentoml
from PIL.Image import Image as PILImage
from pydantic import ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from bentoml_diffusers.errors import (
    DiffusersError,
    RequestCancelled,
    UnreadableRequest,
)
from bentoml_diffusers.media import decode_video
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.serving.callers import (
    PICKLE,
    Arguments,
    decode_field,
    is_bentoml_client,
    is_neighbour,
    read_neighbour,
)
from bentoml_diffusers.serving.codecs import decode_base64, decode_image, prepare_image
from bentoml_diffusers.serving.faults import MAX_FAULTS, list_faults
from bentoml_diffusers.serving.refusals import UnsupportedMediaType
from bentoml_diffusers.serving.uploads import UploadBudget
from bentoml_diffusers.workflow.files import count_json_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.datastructures import FormData, UploadFile
    from starlette.requests import Request


_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_JSON_TOKENS = 2**20  # commas and brackets of a JSON body, those in its texts not counted
_MAX_FORM_JSON_TOKENS = 2**16  # of a field of a form


@dataclass(frozen=True)
class Refusal:
    """Comes to an API in place of its fields, so that each error is answered at one place.

    BentoML itself would log a traceback for each bad request, and name no field in its text.
    """

    refusal: DiffusersError
    model_fields: ClassVar = ("refusal",)


class RequestModel(bentoml.IODescriptor):  # type: ignore[misc]
    """A request body, read strictly: JSON, or a form with files."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    limits: ClassVar[RequestLimits] = RequestLimits()
    flags: ClassVar[frozenset[str]] = frozenset()  # fields that are true or false
    video_fields: ClassVar[frozenset[str]] = frozenset()  # files that become lists of frames
    base64_fields: ClassVar[frozenset[str]] = frozenset()  # in base64, or a file in a form
    uploads: ClassVar[UploadBudget] = UploadBudget(RequestLimits().max_open_upload_bytes)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read ``true`` as 1."""
        if isinstance(value, bool) and info.field_name not in cls.flags:
            raise PydanticCustomError("no_boolean", "Input should not be true or false")
        return value

    @classmethod
    def from_inputs(cls, *args: Any, **kwargs: Any) -> Arguments:
        """Returns what BentoML's client is called with, for it to send."""
        by_position = dict(zip(cls.model_fields, args))  # noqa: B905 - Python's own error: below
        if len(args) > len(cls.model_fields) or set(by_position) & set(kwargs):
            raise TypeError("too many arguments, or one by position and by name")
        return Arguments({**by_position, **kwargs}, cls.multipart_fields)

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Any:
        """Reads a request; returns a :class:`Refusal` if something is wrong with it."""
        from starlette.requests import ClientDisconnect

        max_bytes = cls._max_body_bytes()
        if _media_type(request) == PICKLE:  # bare pixels in place of files
            max_bytes += len(cls.multipart_fields) * cls.limits.max_pixels * 4
        try:
            with cls.uploads.bound(request, max_bytes) as bounded:
                return await cls.from_values(await cls._read_body(bounded, serde))
        except ValidationError as err:
            return Refusal(UnreadableRequest(list_faults(cls, err)))
        except ClientDisconnect:
            return Refusal(RequestCancelled("the client went away"))
        except DiffusersError as err:
            return Refusal(err)

    @classmethod
    async def from_values(cls, given: Mapping[str, Any]) -> Self:
        """Checks the values of fields: files as bytes, in base64, or as images.

        Raises:
            UnreadableRequest: 400, says which are wrong.
        """
        values = _without_absent(cls, given)
        try:
            for name in cls.multipart_fields:
                if name in values:
                    # Beside the event loop: large files take a while.
                    values[name] = await asyncio.to_thread(cls._decode_file, name, values[name])
            model: Self = cls.model_validate(values)
        except ValidationError as err:
            raise UnreadableRequest(list_faults(cls, err)) from err
        return model

    @classmethod
    async def _read_body(cls, request: Request, serde: Any) -> dict[str, Any]:
        """Web pages may send any other type than JSON without asking a browser's permission."""
        media_type = _media_type(request)
        if media_type in _FORMS:
            return await cls._read_form(request)
        if media_type == "application/json":
            return cls._read_json(await request.body())
        if media_type == PICKLE and is_neighbour(request, serde):
            return read_neighbour(await request.body(), request.headers, serde)
        if not media_type and not await request.body():
            return {}
        raise UnsupportedMediaType(media_type, f"application/json, {' or '.join(_FORMS)}")

    @classmethod
    async def _read_form(cls, request: Request) -> dict[str, Any]:
        from starlette.exceptions import HTTPException

        try:
            async with request.form() as form:
                decode = decode_field if is_bentoml_client(request.headers) else read_structure
                return await cls._read_fields(form, decode)
        except HTTPException as err:
            raise cls._fault("body", f"a broken form: {err.detail}") from err

    @classmethod
    async def _read_fields(cls, form: FormData, decode: Callable[[str], Any]) -> dict[str, Any]:
        from starlette.datastructures import UploadFile

        values: dict[str, Any] = {}
        if any(name.lstrip()[:1] in ("{", "[") for name in form):
            hint = "JSON that came as a form: send -H 'content-type: application/json' with it"
            raise cls._fault("body", hint)
        for name, value in form.multi_items():
            if name in values:
                raise cls._fault(name, "given more than once")
            if name not in cls.model_fields:
                values[name] = None  # refused later, with all others; a file is not read
            elif isinstance(value, UploadFile):
                values[name] = await cls._read_upload(name, value)
            elif name in cls.multipart_fields:
                raise cls._fault(name, "text, expected an uploaded file")
            elif value != "":
                values[name] = decode(value)
        return values

    @classmethod
    async def _read_upload(cls, name: str, file: UploadFile) -> bytes | str:
        if name in cls.multipart_fields:
            return await file.read()
        if name in cls.base64_fields:
            return base64.b64encode(await file.read()).decode()
        raise cls._fault(name, "a file, expected text")

    @classmethod
    def _read_json(cls, body: bytes) -> dict[str, Any]:
        if (
            count_json_tokens(body)
            > _MAX_JSON_TOKENS + len(cls.model_fields) * cls.limits.max_prompt_chars
        ):
            raise cls._fault("body", "too many lists and objects")
        try:
            values = json.loads(body or b"{}")
        except (ValueError, RecursionError) as err:
            raise cls._fault("body", f"not JSON: {err}") from err
        if not isinstance(values, dict):
            raise cls._fault("body", f"got {type(values).__name__}, expected an object of fields")
        return values

    @classmethod
    def _max_body_bytes(cls) -> int:
        """Files as base64, texts as JSON with 12 characters for one, and room for the rest."""
        files = len(cls.multipart_fields) * cls.limits.max_upload_bytes * 3 // 2  # base64 in lines
        return files + len(cls.model_fields) * cls.limits.max_prompt_chars * 12 + 2**20

    @classmethod
    def _decode_file(cls, name: str, value: Any) -> Any:
        try:
            if isinstance(value, PILImage):  # of a neighbour
                return prepare_image(value, cls.limits)
            if name in cls.video_fields:
                return decode_video(cls._read_file(name, value), cls.limits).frames
            return decode_image(cls._read_file(name, value), cls.limits)
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


def _without_absent(model: type[RequestModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is null: it says what a field that is left out says.

    Of unknown fields there are no more than an error lists: a body may have a million.
    """
    unknown = [name for name in values if name not in model.model_fields]
    present = {name: values[name] for name in values if values[name] is not None}
    for name in unknown[MAX_FAULTS + 1 :]:
        present.pop(name, None)
    return {**present, **dict.fromkeys(unknown[: MAX_FAULTS + 1])}


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def read_structure(text: str) -> Any:
    """Forms carry lists and objects as JSON; all else stays text for pydantic to read."""
    if text[:1] in ("[", "{") and count_json_tokens(text.encode()) <= _MAX_FORM_JSON_TOKENS:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text
