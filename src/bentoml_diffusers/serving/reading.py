"""How the body of a request is read: strictly, from JSON or a form, within bounds.

BentoML's own reading of requests fetches text in a file field as a URL, answers 500 to a broken
image, turns the prompt ``"12"`` of a form into a number, and ignores unknown fields.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import bentoml
from pydantic import ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from bentoml_diffusers.errors import UnreadableRequest
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.serving.codecs import decode_base64, decode_image
from bentoml_diffusers.serving.faults import MAX_FAULTS, list_faults
from bentoml_diffusers.workflow.files import count_marks

if TYPE_CHECKING:
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.types import Message


_MAX_MARKS = 2**20  # commas and brackets of a JSON body, those in its texts not counted
_MAX_FORM_MARKS = 2**16  # of a field of a form


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
            return Refusal(UnreadableRequest(list_faults(cls, err)))

    @classmethod
    async def _read(cls, request: Request) -> Self:
        request = cls._bound_body(request)
        media_type = request.headers.get("content-type", "").split(";")[0].strip()
        if media_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
            values = await cls._read_form(request)
        else:
            values = cls._read_json(await request.body())
        values = _without_absent(cls, values)
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
            if name in values:
                raise cls._fault(name, "given more than once")
            if name not in cls.model_fields:
                values[name] = None  # refused later, with all others; a file is not read
            elif isinstance(value, UploadFile):
                if name not in cls.multipart_fields:
                    raise cls._fault(name, "a file, expected text")
                values[name] = await value.read()
            elif name in cls.multipart_fields:
                raise cls._fault(name, "text, expected an uploaded file")
            elif value != "":
                values[name] = _read_structure(value)
        return values

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
        files = len(cls.multipart_fields) * cls.limits.max_upload_bytes * 3 // 2  # base64 in lines
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


def _without_absent(model: type[RequestModel], values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is null: it says what a field that is left out says.

    Of unknown fields there are no more than an error lists: a body may have a million.
    """
    unknown = [name for name in values if name not in model.model_fields]
    present = {name: values[name] for name in values if values[name] is not None}
    for name in unknown[MAX_FAULTS + 1 :]:
        present.pop(name, None)
    return {**present, **dict.fromkeys(unknown[: MAX_FAULTS + 1])}


def _read_structure(text: str) -> Any:
    """Forms carry lists and objects as JSON; all else stays text for pydantic to read."""
    if text[:1] in ("[", "{") and count_marks(text.encode()) <= _MAX_FORM_MARKS:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text
