"""Answers of the services: an image with what is to be said of it, or an error as JSON."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from bentoml_diffusers.errors import (
    DiffusersError,
    QueueFull,
    UnreadableRequest,
    WorkflowMismatch,
)
from bentoml_diffusers.serving.refusals import UploadsFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from bentoml_diffusers.errors import Faults
    from bentoml_diffusers.serving.calls import Answer
    from bentoml_diffusers.serving.codecs import OutputFormat
    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.encoding import Encoded

# What the headers of an answer with an image say, for the OpenAPI document.
HEADERS = {
    "x-seed": "The seed that was used.",
    "x-warnings": "What was not done as it was written: a JSON list of texts; where there is any.",
    "x-nsfw-content-detected": "true or false: the model's safety checker flagged the image, which "
    "is black then; where the model has one.",
    "x-workflow": "embedded or too-large: whether the workflow is in the image; where the service "
    "embeds workflows.",
    "x-request-id": "That of the request, or one that was made for it.",
}
REPLAY_HEADERS = {
    **HEADERS,
    "x-workflow-match": "true or false: the pixels are those that the workflow recorded; where no "
    "override makes another image.",
}
_MAX_NAME_CHARS = 200
_MAX_TEXT_CHARS = 2000
_HASH = re.compile(r"[0-9a-f]{20,}|[0-9a-f]{6,}(?=…)")  # whole, or cut off
_MAX_HEADER_BYTES = 2048  # of 4 to 8 KiB that proxies take for all headers


async def answer(
    dispatcher: Dispatcher, work: Awaitable[Answer], output_format: OutputFormat
) -> Response:
    """Answers with an image and what is to be said of it, or with an error as JSON.

    Args:
        dispatcher: Of the service.
        work: Gives what is answered, or raises.
        output_format: Of the image.
    """
    try:
        done = await work
    except DiffusersError as error:
        return error_response(error)
    encoded = await dispatcher.encode(done.results[0], output_format)
    headers = {**describe_answer(done), **_describe_workflow(done, encoded)}
    return Response(encoded.data, media_type=encoded.media_type, headers=headers)


def describe_answer(answer: Answer) -> dict[str, str]:
    """Returns the headers that any service answers with."""
    headers = {"x-seed": str(answer.seeds[0])} if answer.seeds else {}
    if answer.flags:
        headers["x-nsfw-content-detected"] = str(answer.flags[0]).lower()
    if answer.warnings:
        headers["x-warnings"] = _as_header(answer.warnings)
    return headers


def _describe_workflow(answer: Answer, encoded: Encoded) -> dict[str, str]:
    headers = {"x-workflow": encoded.workflow} if encoded.workflow else {}
    replay = answer.results[0].replay
    if replay is not None and replay.matches is not None:
        headers["x-workflow-match"] = str(replay.matches).lower()
    return headers


def _as_header(texts: Sequence[str]) -> str:
    """Returns a JSON list in ASCII, of as many texts as proxies let through."""
    for count in range(len(texts), 0, -1):
        more = [f"and {len(texts) - count} more"] if count < len(texts) else []
        value = json.dumps([*texts[:count], *more])
        if len(value) <= _MAX_HEADER_BYTES:
            return value
    return json.dumps([f"{len(texts)} warnings, too long for a header"])


def error_response(error: DiffusersError) -> Response:
    """Returns an error as JSON, with its status and the name of the field."""
    if isinstance(error, WorkflowMismatch):
        error = _without_hashes(error)
    detail = [{"loc": place, "msg": text} for place, text in list_faults_of(error)]
    waits = isinstance(error, (QueueFull, UploadsFull))
    headers = {"retry-after": str(error.retry_after_s)} if waits else None
    body = {"error": public_text(error), "detail": detail}
    return JSONResponse(body, status_code=int(error.error_code), headers=headers)


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
