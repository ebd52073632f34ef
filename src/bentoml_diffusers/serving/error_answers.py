"""Errors as JSON: what is wrong, and in which field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from bentoml_diffusers.errors import (
    DiffusersError,
    UnreadableRequest,
    WorkflowMismatch,
)

if TYPE_CHECKING:
    from bentoml_diffusers.errors import Faults

_MAX_NAME_CHARS = 200
_MAX_TEXT_CHARS = 2000
_HASH = re.compile(r"[0-9a-f]{20,}|[0-9a-f]{6,}(?=…)")  # whole, or cut off


def error_response(error: DiffusersError) -> Response:
    """Returns an error as JSON, with its status and the name of the field."""
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = None if retry_after_s is None else {"retry-after": str(retry_after_s)}
    return JSONResponse(describe_error(error), int(error.error_code), headers)


def describe_error(error: DiffusersError) -> dict[str, Any]:
    """Returns what a client may read of an error: a text, and each field that is wrong."""
    if isinstance(error, WorkflowMismatch):
        error = _without_hashes(error)
    detail = [{"loc": place, "msg": text} for place, text in list_faults_of(error)]
    return {"error": public_text(error), "detail": detail}


def list_faults_of(error: DiffusersError) -> list[tuple[list[str | int], str]]:
    """Returns the path of each wrong field, and what is wrong."""
    field = getattr(error, "field", None)
    faults: Faults = [([field], str(error))] if field else []
    if isinstance(error, UnreadableRequest):
        faults = error.faults
    return [
        (
            [_cut(part, _MAX_NAME_CHARS) if isinstance(part, str) else part for part in place],
            _cut(text, _MAX_TEXT_CHARS),
        )
        for place, text in faults
    ]


def _without_hashes(error: WorkflowMismatch) -> WorkflowMismatch:
    """The hash of a file tells who has one whether it is the same; nobody else needs it."""
    differences = [_HASH.sub("its hash", one) for one in error.differences]
    return WorkflowMismatch(error.field, differences)


def public_text(error: DiffusersError) -> str:
    """What a client may read: a failure of the pipeline can quote paths of the server."""
    if error.error_code == 500:
        return "the image could not be generated; the server's log says why"
    return _cut(str(error), _MAX_TEXT_CHARS)


def _cut(text: str, max_chars: int) -> str:
    """A request may name fields with lone surrogates, which no answer can carry, or a megabyte."""
    short = text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
    return short.encode(errors="backslashreplace").decode()
