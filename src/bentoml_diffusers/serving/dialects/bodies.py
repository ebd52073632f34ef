"""Bodies of requests as other APIs write them: JSON, or a form with files."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import RequestCancelled, UnreadableRequest
from bentoml_diffusers.serving.refusals import UnsupportedMediaType
from bentoml_diffusers.workflow.files import count_json_tokens

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.dialects.context import DialectContext

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAX_JSON_TOKENS = 2**18  # commas and brackets of a JSON body


def max_body_bytes(limits: RequestLimits, images: int) -> int:
    """Returns how large a body may be with so many images in base64, and texts beside them."""
    return images * limits.max_upload_bytes * 3 // 2 + limits.max_prompt_chars * 48 + 2**20


def media_type(request: Request) -> str:
    """Returns the type of a body without its parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def read_body(context: DialectContext, request: Request, images: int) -> bytes:
    """Returns the body of a request, within the limits of the service.

    Raises:
        UnreadableRequest: 400, larger than it may be.
        UploadsFull: 503, beyond what all requests may hold.
        RequestCancelled: 503, the client went away.
    """
    from starlette.requests import ClientDisconnect

    size = max_body_bytes(context.limits, images)
    try:
        with context.uploads.bound(request, size) as bounded:
            return await bounded.body()
    except ClientDisconnect as err:
        raise RequestCancelled("the client went away") from err


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        UnreadableRequest: 400, no JSON, or no object.
    """
    if count_json_tokens(body) > _MAX_JSON_TOKENS:
        raise UnreadableRequest([(("body",), "too many lists and objects")])
    try:
        values = json.loads(body or b"{}")
    except (ValueError, RecursionError) as err:
        raise UnreadableRequest([(("body",), f"not JSON: {err}")]) from err
    if not isinstance(values, dict):
        text = f"got {type(values).__name__}, expected an object of fields"
        raise UnreadableRequest([(("body",), text)])
    if any(_SURROGATE.search(name) for name in values):  # which no error could name
        raise UnreadableRequest([(("body",), "a name with a lone surrogate")])
    return values


async def read_object(context: DialectContext, request: Request, images: int = 0) -> dict[str, Any]:
    """Reads a JSON object; for the errors see :func:`read_body` and :func:`parse_object`.

    Raises:
        UnsupportedMediaType: 415, of another type; web pages may send those without asking.
    """
    if media_type(request) != "application/json":
        raise UnsupportedMediaType(media_type(request), "application/json")
    return parse_object(await read_body(context, request, images))


async def read_form(
    context: DialectContext, request: Request, files: Collection[str], images: int
) -> list[tuple[str, Any]]:
    """Returns names and values of a form in their order, files as bytes.

    Args:
        context: Of the service.
        request: Its body was not read yet.
        files: Names of the fields that are files.
        images: How many of them may be of full size.

    Raises:
        UnsupportedMediaType: 415, no form.
        UnreadableRequest: 400, a broken one, a file where text belongs, or the other way round.
        UploadsFull: 503, beyond what all requests may hold.
        RequestCancelled: 503, the client went away.
    """
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    if media_type(request) not in FORMS:
        raise UnsupportedMediaType(media_type(request), " or ".join(FORMS))
    size = max_body_bytes(context.limits, images)
    try:
        with context.uploads.bound(request, size) as bounded:
            async with bounded.form() as form:
                return [
                    (name, await _read_value(name, value, files))
                    for name, value in form.multi_items()
                ]
    except HTTPException as err:
        raise UnreadableRequest([(("body",), f"a broken form: {err.detail}")]) from err
    except ClientDisconnect as err:
        raise RequestCancelled("the client went away") from err


async def _read_value(name: str, value: Any, files: Collection[str]) -> Any:
    is_file = not isinstance(value, str)
    if is_file != (name in files) and value != "":
        text = "a file, expected text" if is_file else "text, expected an uploaded file"
        raise UnreadableRequest([((name[:100],), text)])
    return await value.read() if is_file else value
