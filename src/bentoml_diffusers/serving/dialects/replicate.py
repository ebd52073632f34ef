"""Replicate's API: requests as jobs, which clients wait for, watch, or come back for."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bentoml_diffusers.errors import DiffusersError, InvalidRequest
from bentoml_diffusers.serving.calls import Call, Caller
from bentoml_diffusers.serving.codecs import FORMATS_BY_KIND, choose_format, media_type_of
from bentoml_diffusers.serving.dialects.bodies import read_object
from bentoml_diffusers.serving.dialects.context import Dialect
from bentoml_diffusers.serving.dialects.names import EDIT, GENERATION, MASKED_EDIT, find_task
from bentoml_diffusers.serving.error_answers import describe_error, error_response
from bentoml_diffusers.serving.event_streams import EventStream, format_event
from bentoml_diffusers.serving.openapi.document import describe_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.jobs import Job
    from bentoml_diffusers.serving.openapi.document import Paths
    from bentoml_diffusers.serving.openapi.schemas import Schema, Schemas

_BODY_FIELDS = ("version", "model", "input", "stream")
# Their names for what the native API has, too.
_RENAMED = {"mask": "mask_image", "prompt_strength": "strength"}
_FORMATS = {"jpg": "jpeg"}
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MAX_WAIT_S = 60.0
_LOOK_S = (0.02, 0.5)  # from one look at a job to the next: at first, and in the end
_PAGE = 100


def make_routes(context: DialectContext) -> Sequence[BaseRoute]:
    """Returns the routes of predictions and of their images."""

    async def create(request: Request) -> Response:
        return await _create(context, request)

    async def list_all(request: Request) -> Response:
        caller, cursor = Caller.of(request.scope), request.query_params.get("cursor", "")
        before = int(cursor) if cursor.isdecimal() else None
        found = await asyncio.to_thread(
            context.jobs.list_jobs, caller, before=before, limit=_PAGE + 1
        )
        shown, has_more = found[:_PAGE], len(found) > _PAGE
        body = {
            "previous": None,
            "next": str(request.url.replace(query=f"cursor={shown[-1][0]}")) if has_more else None,
            "results": await asyncio.to_thread(
                lambda: [describe(context, request, job) for _, job in shown]
            ),
        }
        return JSONResponse(body)

    async def show(request: Request) -> Response:
        job = await asyncio.to_thread(context.jobs.get, *_named(request))
        return JSONResponse(describe(context, request, job))

    async def cancel(request: Request) -> Response:
        job = await asyncio.to_thread(context.jobs.cancel, *_named(request))
        return JSONResponse(describe(context, request, job))

    async def watch(request: Request) -> Response:
        caller, job_id = _named(request)
        await asyncio.to_thread(context.jobs.get, caller, job_id)
        return EventStream(_events(context, request))

    async def file(request: Request) -> Response:
        job_id, name = request.path_params["id"], request.path_params["name"]
        data = await asyncio.to_thread(
            context.jobs.read, request.url.path, request.query_params, job_id, name
        )
        suffix = name.rpartition(".")[2]
        kind = "image" if suffix in FORMATS_BY_KIND["image"] else "video"
        return Response(data, media_type=media_type_of(kind, suffix))

    plain = "/v1/predictions"
    return [
        Route(plain, _guarded(create), methods=["POST"]),
        Route(plain, _guarded(list_all), methods=["GET"]),
        Route(f"{plain}/{{id}}", _guarded(create), methods=["PUT"]),
        Route(f"{plain}/{{id}}", _guarded(show), methods=["GET"], name="prediction"),
        Route(f"{plain}/{{id}}/cancel", _guarded(cancel), methods=["POST"]),
        Route(f"{plain}/{{id}}/stream", _guarded(watch), methods=["GET"]),
        Route(f"{plain}/{{id}}/files/{{name}}", _guarded(file), methods=["GET"]),
        Route("/v1/models/{owner}/{name}/predictions", _guarded(create), methods=["POST"]),
    ]


def _guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[..., Any]:
    """Answers errors in the form of RFC 7807, beside that of the other paths."""

    async def guarded(request: Request) -> Response:
        try:
            return await handle(request)
        except DiffusersError as error:
            status = HTTPStatus(error.error_code)
            told = describe_error(error)
            body = {
                "type": "about:blank",
                "title": status.phrase,
                "status": int(status),
                "detail": told["error"],
                "invalid_fields": told["detail"],
            }
            headers = dict(error_response(error).headers)
            kept = {name: headers[name] for name in ("retry-after",) if name in headers}
            return JSONResponse(body, int(status), kept, media_type="application/problem+json")

    return guarded


def _named(request: Request) -> tuple[Caller, str]:
    return Caller.of(request.scope), request.path_params["id"]


async def _create(context: DialectContext, request: Request) -> Response:
    job_id = request.path_params.get("id")
    if job_id is not None and not _ID.fullmatch(job_id):
        raise InvalidRequest("id", job_id, "1 to 128 letters, digits, '-' and '_'")
    body = await read_object(context, request, images=2)
    task, values, n, chosen = translate(context, body)
    fields = {**values, "n": n} | ({} if chosen is None else {"output_format": chosen})
    arguments = await context.dispatcher.read(task, fields)
    kind = context.dispatcher.engine.find_task(task).output.kind
    await context.dispatcher.check(Call(task=task, arguments=arguments, n=n))
    job = await asyncio.to_thread(
        context.jobs.add,
        Caller.of(request.scope),
        task,
        values,
        job_id=job_id,
        asked=body["input"],
        n=n,
        output_format=choose_format(kind, chosen),
    )
    seconds = read_wait(request.headers.get("prefer", ""))
    job = await _wait(context, job, min(seconds, _longest_wait(context)))
    body = describe(context, request, job)
    if seconds and not job.is_over:
        # Replicate's client takes any other status of an answer it waited for as the end.
        body["status"] = "starting"
    return JSONResponse(body, HTTPStatus.CREATED)


def translate(
    context: DialectContext, body: Mapping[str, Any]
) -> tuple[str, dict[str, Any], int, str | None]:
    """Returns the task, the values of native fields, how many images, and their format if given.

    Raises:
        InvalidRequest: 400, a field that cannot be.
        UnsupportedOperation: 400, the model does not do it.
    """
    for name in body:
        if name not in _BODY_FIELDS:
            raise InvalidRequest(name, body[name], f"only {', '.join(_BODY_FIELDS)}")
    given = body.get("input")
    if not isinstance(given, dict):
        raise InvalidRequest("input", given, "an object")
    values: dict[str, Any] = {
        _RENAMED.get(str(name), str(name)): value for name, value in given.items()
    }
    n = values.pop("num_outputs", 1)
    if type(n) is not int or not 1 <= n <= context.limits.max_images:
        raise InvalidRequest("num_outputs", n, f"an integer from 1 to {context.limits.max_images}")
    output_format = values.pop("output_format", None)
    own = values.pop("task", None)
    if own is not None and own not in context.requests:
        raise InvalidRequest("input.task", own, f"one of {', '.join(context.requests)}")
    names = MASKED_EDIT if "mask_image" in values else EDIT if "image" in values else GENERATION
    task = find_task(context.requests, names) if own is None else str(own)
    return task, values, n, output_format and _FORMATS.get(str(output_format), str(output_format))


def read_wait(prefer: str) -> float:
    """Returns the seconds that a header ``Prefer`` lets an answer wait; ``wait`` alone is all."""
    for part in prefer.split(","):
        name, _, value = part.strip().partition("=")
        if name == "wait":
            return min(float(value), _MAX_WAIT_S) if value.isdecimal() else _MAX_WAIT_S
    return 0.0


def _longest_wait(context: DialectContext) -> float:
    """Seconds after which BentoML would answer 504 in place of the job."""
    timeout_s = context.dispatcher.engine.limits.timeout_s
    return _MAX_WAIT_S if timeout_s is None else timeout_s * 0.9


async def _wait(context: DialectContext, job: Job, seconds: float) -> Job:
    """Looks at a job until it is over, or the time is."""
    until, pause = time.monotonic() + seconds, _LOOK_S[0]
    caller = Caller(name=job.owner) if not job.owner.startswith("address ") else Caller()
    while not job.is_over and time.monotonic() < until:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LOOK_S[1])
        job = await asyncio.to_thread(context.jobs.get, caller, job.id)
    return job


async def _events(context: DialectContext, request: Request) -> AsyncGenerator[bytes, None]:
    """Says each step in ``logs``, each image in ``output``, and how it ended in ``done``."""
    caller, job_id = _named(request)
    told, pause = "", _LOOK_S[0]
    while True:
        job = await asyncio.to_thread(context.jobs.get, caller, job_id)
        line = _progress(job)
        if line and line != told:
            told = line
            yield format_event("logs", line)
        if job.is_over:
            break
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LOOK_S[1])
    if job.status == "failed":
        yield format_event("error", {"detail": job.error})
    for address in _addresses(context, request, job):
        yield format_event("output", address)
    yield format_event("done", {"reason": job.status} if job.status != "succeeded" else {})


def describe(context: DialectContext, request: Request, job: Job) -> dict[str, Any]:
    """Returns a prediction."""
    base = f"{str(request.base_url).rstrip('/')}/v1/predictions/{job.id}"
    seconds = job.ended - job.started if job.ended and job.started else None
    return {
        "id": job.id,
        "model": context.model,
        "version": context.model.partition(":")[2] or "latest",
        "status": job.status,
        "input": job.asked,
        "output": _addresses(context, request, job) or None,
        "error": job.error,
        "logs": _progress(job),
        "metrics": {"predict_time": seconds} if seconds is not None else {},
        "seeds": list(job.seeds),
        "queue_position": context.jobs.position(job) if job.status == "starting" else None,
        "created_at": _moment(job.created),
        "started_at": _moment(job.started),
        "completed_at": _moment(job.ended),
        "urls": {"get": base, "cancel": f"{base}/cancel", "stream": f"{base}/stream"},
    }


def _addresses(context: DialectContext, request: Request, job: Job) -> list[str]:
    base = str(request.base_url).rstrip("/")
    prefix = request.base_url.path.rstrip("/")
    paths = (f"{prefix}/v1/predictions/{job.id}/files/{name}" for name in job.files)
    return [base + context.jobs.sign(path).removeprefix(prefix) for path in paths]


def _progress(job: Job) -> str:
    """A line as tqdm writes it, which Replicate's clients read."""
    if not job.of:
        return ""
    percent = job.step * 100 // job.of
    return f"{percent:3d}%|{'#' * (percent // 10):<10}| {job.step}/{job.of}\n"


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def describe_fields(context: DialectContext) -> dict[str, Any]:
    """Returns what becomes of the fields of a prediction."""
    native = sorted({name for one in context.requests.values() for name in one.model_fields})
    own = [*_BODY_FIELDS, "input.task", "input.num_outputs", *_RENAMED]
    return {
        "/v1/predictions": {"applied": [*own, *native], "ignored": ["version", "model", "stream"]}
    }


def describe_paths(context: DialectContext, schemas: Schemas) -> Paths:
    """Returns the paths of predictions, for the OpenAPI document."""
    del context
    schemas.add("Prediction", _PREDICTION)
    answer = {
        "description": "The prediction.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Prediction"}}},
    }

    def operation(name: str, summary: str, status: str, **more: Any) -> dict[str, Any]:
        return {
            "operationId": name,
            "summary": summary,
            "tags": ["jobs"],
            "responses": {status: answer, **describe_errors((400, 404, 409, 429, 503))},
            **more,
        }

    body = {"required": True, "content": {"application/json": {"schema": _BODY}}}
    named = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "/v1/predictions": {
            "post": operation("create_prediction", "Takes a job", "201", requestBody=body),
            "get": operation("list_predictions", "Your jobs, the latest first", "200"),
        },
        "/v1/predictions/{id}": {
            "put": operation(
                "put_prediction",
                "Takes a job under an id of your own",
                "201",
                requestBody=body,
                parameters=named,
            ),
            "get": operation("get_prediction", "A job", "200", parameters=named),
        },
        "/v1/predictions/{id}/cancel": {
            "post": operation("cancel_prediction", "Cancels a job", "200", parameters=named)
        },
    }


_TEXT: Schema = {"type": ["string", "null"]}
_BODY: Schema = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {"type": "object", "description": "Fields of a task, num_outputs, output_format."},
        "version": _TEXT,
        "model": _TEXT,
        "stream": {"type": ["boolean", "null"]},
    },
}
_PREDICTION: Schema = {
    "type": "object",
    "required": ["id", "status", "urls"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["starting", "processing", "succeeded", "failed", "canceled"]},
        "output": {"type": ["array", "null"], "items": {"type": "string", "format": "uri"}},
        "error": _TEXT,
        "logs": {"type": "string"},
        "urls": {"type": "object"},
    },
}

DIALECT = Dialect(make_routes, describe_paths, describe_fields)
