"""Answers of the native API: files, as they are, as parts of one body, as a zip, or in JSON."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import secrets
import zipfile
from typing import TYPE_CHECKING, Any, Literal

from starlette.concurrency import iterate_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from bentoml_diffusers.media import FORMATS
from bentoml_diffusers.serving.encoding import can_stream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bentoml_diffusers.engine import Result
    from bentoml_diffusers.serving.calls import Answer
    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.encoding import Encoded, FileFacts

Form = Literal["file", "multipart", "zip", "json", "events"]
EVENTS = "text/event-stream"
_FORMS: Mapping[str, Form] = {
    "application/json": "json",
    "multipart/mixed": "multipart",
    "application/zip": "zip",
    EVENTS: "events",
}
_FILES = ("image/", "video/", "audio/")
MEDIA_TYPES = (*(f"{one}*" for one in _FILES), *_FORMS)
# What the headers of an answer with images say, for the OpenAPI document.
HEADERS = {
    "x-seed": "The seed that was used; of several images all, as `7, 8`.",
    "x-warnings": "What was not done as it was written: a JSON list of texts; where there is any.",
    "x-nsfw-content-detected": "true or false: the model's safety checker flagged the image, which "
    "is black then; where the model has one.",
    "x-workflow": "embedded, too-large or no-place: whether the workflow is in the file; where the "
    "service embeds workflows.",
    "x-request-id": "That of the request, or one that was made for it.",
}
REPLAY_HEADERS = {
    **HEADERS,
    "x-workflow-match": "true or false: the pixels are those that the workflow recorded; where no "
    "override makes another image.",
}
_MAX_HEADER_BYTES = 2048  # of 4 to 8 KiB that proxies take for all headers


def choose_form(accept: str) -> Form:
    """Returns what a client asks for by its header ``Accept``.

    A client that takes an image, or anything, as gladly as what it names gets the image: the
    clients of several languages say JSON, and mean that they can read it.
    """
    ranked: dict[float, list[str]] = {}
    for item in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        ranked.setdefault(_read_quality(parameters), []).append(media_type)
    for quality in sorted(ranked, reverse=True):
        named = ranked[quality]
        if quality > 0 and any(one == "*/*" or one.startswith(_FILES) for one in named):
            return "file"
        known = [_FORMS[one] for one in named if one in _FORMS]
        if quality > 0 and known:
            return known[0]
    return "file"


def _read_quality(parameters: Sequence[str]) -> float:
    try:
        return next((float(one[2:]) for one in parameters if one.startswith("q=")), 1.0)
    except ValueError:
        return 1.0


async def make_response(
    dispatcher: Dispatcher, answer: Answer, output_format: str, form: Form
) -> Response:
    """Answers with images, videos or sound, and what is to be said of them.

    Args:
        dispatcher: Of the service.
        answer: What came of the call.
        output_format: Of the files.
        form: As the client asked for it; several files are a zip.

    Raises:
        CodecMissing: 501, PyAV is not installed.
        PipelineFailed: 500, sound that holds NaN.
    """
    first = answer.results[0]
    if form == "file" and len(answer.results) == 1 and can_stream(first, output_format):
        streamed = await dispatcher.stream_file(first, output_format)
        headers = describe_headers(answer, [streamed.facts])
        pieces = iterate_in_threadpool(streamed.pieces)
        media_type = streamed.facts.media_type
        return StreamingResponse(pieces, media_type=media_type, headers=headers)
    encoded = await asyncio.gather(
        *(dispatcher.encode(result, output_format) for result in answer.results)
    )
    headers = describe_headers(answer, [one.facts for one in encoded])
    if form == "json":
        return JSONResponse(describe_answer(answer, encoded), headers=headers)
    if form == "multipart":
        return _multipart_response(answer, encoded, headers)
    if form == "zip" or len(encoded) > 1:
        data = _make_zip(answer, encoded)
        return Response(data, media_type="application/zip", headers=headers)
    return Response(encoded[0].data, media_type=encoded[0].media_type, headers=headers)


def describe_answer(answer: Answer, encoded: Sequence[Encoded]) -> dict[str, Any]:
    """Returns an answer for JSON, its files in base64."""
    files = [
        {**describe_file(result, one.facts), "data": base64.b64encode(one.data).decode()}
        for result, one in zip(answer.results, encoded, strict=True)
    ]
    return {**describe_run(answer), f"{encoded[0].facts.kind}s": files}


def describe_file(result: Result, facts: FileFacts) -> dict[str, Any]:
    """Returns what is said of one image, video or sound."""
    flags, replay = result.nsfw_content_detected, result.replay
    return {
        "media_type": facts.media_type,
        **facts.about,
        "seed": result.seeds[0] if result.seeds else None,
        "nsfw_content_detected": flags[0] if flags else None,
        "workflow_embedded": None if facts.workflow is None else facts.workflow == "embedded",
        "workflow_match": None if replay is None else replay.matches,
    }


def describe_run(answer: Answer) -> dict[str, Any]:
    """Returns what is said of all images together."""
    first = answer.results[0]
    return {
        "request_id": answer.request_id,
        "scheduler": first.scheduler,
        "steps": first.steps,
        "adapters": list(first.adapters),
        "batches": {str(size): forwards for size, forwards in sorted(answer.batches.items())},
        "queue_s": round(answer.queue_s, 6),
        "run_s": round(answer.run_s, 6),
        "warnings": list(answer.warnings),
    }


def describe_headers(answer: Answer, files: Sequence[FileFacts] = ()) -> dict[str, str]:
    """Returns the headers of an answer in any dialect; those of its files where these are sent."""
    matches = [one.replay.matches for one in answer.results if one.replay is not None]
    listed: dict[str, list[Any]] = {
        "x-seed": list(answer.seeds),
        "x-nsfw-content-detected": list(answer.flags),
        "x-workflow": [one.workflow for one in files],
        "x-workflow-match": matches,
    }
    headers = {
        name: ", ".join(str(value).lower() for value in values)
        for name, values in listed.items()
        if values and None not in values
    }
    if answer.warnings:
        headers["x-warnings"] = _as_header(answer.warnings)
    return headers


def _as_header(texts: Sequence[str]) -> str:
    """Returns a JSON list in ASCII, of as many texts as proxies let through."""
    for count in range(len(texts), 0, -1):
        more = [f"and {len(texts) - count} more"] if count < len(texts) else []
        value = json.dumps([*texts[:count], *more])
        if len(value) <= _MAX_HEADER_BYTES:
            return value
    return json.dumps([f"{len(texts)} warnings, too long for a header"])


def _name_files(answer: Answer, encoded: Sequence[Encoded]) -> list[str]:
    return [
        f"{one.facts.kind}-{number}{f'-seed-{result.seeds[0]}' if result.seeds else ''}"
        f".{_suffix_of(one.media_type)}"
        for number, (result, one) in enumerate(zip(answer.results, encoded, strict=True), 1)
    ]


def _suffix_of(media_type: str) -> str:
    known = {
        found.media_type: found.suffixes[0][1:] for found in FORMATS.values() if found.suffixes
    }
    return known.get(media_type, media_type.rpartition("/")[2])


def _make_zip(answer: Answer, encoded: Sequence[Encoded]) -> bytes:
    """Packs the files as they are, and ``answer.json`` with what is said of them."""
    names = _name_files(answer, encoded)
    files = [
        {"file": name, **describe_file(result, one.facts)}
        for name, result, one in zip(names, answer.results, encoded, strict=True)
    ]
    key = f"{encoded[0].facts.kind}s"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, one in zip(names, encoded, strict=True):
            archive.writestr(name, one.data)
        archive.writestr("answer.json", json.dumps({**describe_run(answer), key: files}))
    return buffer.getvalue()


def _multipart_response(
    answer: Answer, encoded: Sequence[Encoded], headers: Mapping[str, str]
) -> Response:
    """Each image is a part with its own seed (RFC 2046)."""
    boundary = secrets.token_hex(16)
    body = bytearray()
    for name, result, one in zip(
        _name_files(answer, encoded), answer.results, encoded, strict=True
    ):
        said = [f'content-disposition: attachment; filename="{name}"']
        said += [f"x-seed: {result.seeds[0]}"] if result.seeds else []
        head = "\r\n".join([f"--{boundary}", f"content-type: {one.media_type}", *said])
        body += f"{head}\r\n\r\n".encode() + one.data + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    media_type = f"multipart/mixed; boundary={boundary}"
    return Response(bytes(body), media_type=media_type, headers=dict(headers))
