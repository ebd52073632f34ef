"""Answers of the services: an image with what is to be said of it, or an error as JSON."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from bentoml_diffusers.errors import (
    DiffusersError,
    QueueFull,
    RequestCancelled,
    UnreadableRequest,
    WorkflowMismatch,
)
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.refusals import UploadsFull
from bentoml_diffusers.serving.sizes import check_whole_size, has_size_of_image
from bentoml_diffusers.tasks import ADAPTER_OPTIONS
from bentoml_diffusers.workflow.files import Embedding, embed_workflow

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    import bentoml

    from bentoml_diffusers.engine import Engine, Result
    from bentoml_diffusers.errors import Faults
    from bentoml_diffusers.serving.codecs import OutputFormat
    from bentoml_diffusers.serving.endpoints import Endpoint

NOTHING = EmbedOptions()
# What the headers of an answer with an image say, for the OpenAPI document.
HEADERS = {
    "x-seed": "The seed that was used.",
    "x-warnings": "What was not done as it was written: a JSON list of texts; where there is any.",
    "x-nsfw-content-detected": "true or false: the model's safety checker flagged the image, which "
    "is black then; where the model has one.",
    "x-workflow": "embedded or too-large: whether the workflow is in the image; where the service "
    "embeds workflows.",
}
_MAX_NAME_CHARS = 200
_MAX_TEXT_CHARS = 2000
_HASH = re.compile(r"[0-9a-f]{20,}|[0-9a-f]{6,}(?=…)")  # whole, or cut off
_MAX_HEADER_BYTES = 2048  # of 4 to 8 KiB that proxies take for all headers


async def answer(
    engine: Engine,
    ctx: bentoml.Context,
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    embed: EmbedOptions = NOTHING,
) -> Response:
    """Runs a request of a service and answers it. See :func:`answer_with`."""
    task = endpoint.task
    if "refusal" in fields:
        return refuse(ctx, task, fields["refusal"])

    async def generate() -> Result:
        arguments = read_arguments(fields)
        if has_size_of_image(engine.find_task(task), fields):
            arguments["keep_size"] = True
        check_whole_size(engine, task, endpoint.request.limits, arguments)
        if embed.workflow or embed.infotext:
            arguments["return_workflow"] = True
        on_step = process_metrics().count_steps(task)
        return await engine.arun(task, on_step=on_step, **arguments)

    return await answer_with(generate(), ctx, task, fields["output_format"], embed)


def read_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request as arguments of an engine; ``None`` is left out."""
    arguments = {key: value for key, value in fields.items() if value is not None}
    arguments.pop("output_format", None)
    for name in ADAPTER_OPTIONS.values():
        if name in arguments:
            arguments[name] = [choice.model_dump() for choice in arguments[name]]
    return arguments


async def answer_with(
    generation: Coroutine[Any, Any, Result],
    ctx: bentoml.Context,
    task: str,
    output_format: OutputFormat,
    embed: EmbedOptions = NOTHING,
) -> Response:
    """Answers with a result: an image with its seed, or an error as JSON.

    The request is stopped within one denoising step when its client goes away or BentoML's
    ``traffic.timeout`` cancels it.

    Args:
        generation: Gives the result, or raises.
        ctx: That of the request.
        task: Its name in the metrics.
        output_format: Of the image.
        embed: What is written into it.
    """
    try:
        result = await _wait_while_connected(generation, ctx)
    except DiffusersError as error:
        return refuse(ctx, task, error)
    except asyncio.CancelledError:
        # By BentoML's timeout, where a single forward takes longer than the engine's is shorter.
        process_metrics().note_outcome(task, "expired")
        raise
    process_metrics().note_result(task, result)
    return await asyncio.to_thread(_image_response, result, output_format, embed)


async def _wait_while_connected(
    generation: Coroutine[Any, Any, Result], ctx: bentoml.Context
) -> Result:
    running = asyncio.ensure_future(generation)
    leaving = asyncio.ensure_future(_wait_for_disconnect(ctx))
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise RequestCancelled("the client went away")
    finally:
        running.cancel()
        leaving.cancel()


async def _wait_for_disconnect(ctx: bentoml.Context) -> None:
    while (await ctx.request.receive())["type"] != "http.disconnect":
        pass  # the body, read before


def _image_response(result: Result, output_format: OutputFormat, options: EmbedOptions) -> Response:
    image = result.images[0]
    embedding = Embedding()
    if result.workflow is not None:
        embedding = embed_workflow(result.workflow, image, output_format, options)
    headers = _say_result(result)
    if options.workflow:
        headers["x-workflow"] = "embedded" if embedding.is_whole else "too-large"
    if result.replay is not None and result.replay.matches is not None:
        headers["x-workflow-match"] = str(result.replay.matches).lower()
    body = encode_image(image, output_format, embedding.arguments)
    return Response(body, media_type=f"image/{output_format}", headers=headers)


def _say_result(result: Result) -> dict[str, str]:
    """Returns the headers that any service answers with."""
    headers = {"x-seed": str(result.seeds[0])} if result.seeds else {}
    if result.nsfw_content_detected:
        headers["x-nsfw-content-detected"] = str(result.nsfw_content_detected[0]).lower()
    if result.warnings:
        headers["x-warnings"] = _as_header(result.warnings)
    return headers


def _as_header(texts: Sequence[str]) -> str:
    """Returns a JSON list in ASCII, of as many texts as proxies let through."""
    for count in range(len(texts), 0, -1):
        more = [f"and {len(texts) - count} more"] if count < len(texts) else []
        value = json.dumps([*texts[:count], *more])
        if len(value) <= _MAX_HEADER_BYTES:
            return value
    return json.dumps([f"{len(texts)} warnings, too long for a header"])


def refuse(ctx: bentoml.Context, task: str, error: DiffusersError) -> Response:
    """Counts an error and answers with it."""
    process_metrics().note_error(task, error)
    return error_response(ctx, error)


def error_response(ctx: bentoml.Context, error: DiffusersError) -> Response:
    """Returns an error as JSON, with its status and the name of the field."""
    if isinstance(error, WorkflowMismatch):
        error = _without_hashes(error)
    status = int(error.error_code)
    ctx.response.status_code = status  # else BentoML puts its own 200 on the answer
    detail = [{"loc": place, "msg": text} for place, text in _list_faults(error)]
    waits = isinstance(error, (QueueFull, UploadsFull))
    headers = {"retry-after": str(error.retry_after_s)} if waits else None
    body = {"error": _public_text(error), "detail": detail}
    return JSONResponse(body, status_code=status, headers=headers)


def _list_faults(error: DiffusersError) -> list[tuple[list[str | int], str]]:
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


def _public_text(error: DiffusersError) -> str:
    """What a client may read: a failure of the pipeline can quote paths of the server."""
    if error.error_code == 500:
        return "the image could not be generated; the server's log says why"
    return _cut(str(error), _MAX_TEXT_CHARS)


def _cut(text: str, max_chars: int) -> str:
    """A request may name fields with lone surrogates, which no answer can carry, or a megabyte."""
    short = text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
    return short.encode(errors="backslashreplace").decode()
