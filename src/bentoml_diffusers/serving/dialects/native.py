"""The API of this package: a path for each task, with the fields of its pipeline."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import bentoml
from bentoml.validators import ContentType
from PIL.Image import Image
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.answers import choose_form, make_response
from bentoml_diffusers.serving.calls import Call, Caller, Previews
from bentoml_diffusers.serving.capabilities import describe_capabilities, describe_model
from bentoml_diffusers.serving.choices import to_arguments
from bentoml_diffusers.serving.codecs import choose_format
from bentoml_diffusers.serving.dialects.context import Dialect, DialectContext
from bentoml_diffusers.serving.dialects.native_document import describe_paths
from bentoml_diffusers.serving.dialects.native_events import stream
from bentoml_diffusers.serving.encoding import kind_of
from bentoml_diffusers.serving.error_answers import error_response
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.reader import RequestModel
from bentoml_diffusers.serving.refusals import RequestNotFound
from bentoml_diffusers.serving.replays import ReplayCall, make_replay_model
from bentoml_diffusers.serving.request_ids import find_request_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request

    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.endpoints import Endpoint

# What tells BentoML's clients what they get.
_ANSWERS: Mapping[str, Any] = {
    "image": Image,
    "video": Annotated[Path, ContentType("video/*")],
    "audio": Annotated[Path, ContentType("audio/*")],
}


def make_routes(context: DialectContext) -> Sequence[BaseRoute]:
    """Returns what the service answers beside its APIs."""

    async def capabilities(request: Request) -> Response:
        del request
        return JSONResponse(await asyncio.to_thread(describe_capabilities, context))

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"models": [describe_model(context)]})

    async def cancel(request: Request) -> Response:
        request_id = request.path_params["request_id"]
        reason = "cancelled by its caller"
        if not context.dispatcher.cancel(request_id, Caller.of(request.scope), reason):
            return error_response(RequestNotFound(request_id))
        return JSONResponse({"request_id": request_id, "cancelled": True})

    return [
        Route("/capabilities", capabilities),
        Route("/models", models),
        Route("/requests/{request_id}/cancel", cancel, methods=["POST"]),
    ]


def describe_fields(context: DialectContext) -> dict[str, Any]:
    """Returns the fields of each path: all are applied, and others are refused."""
    return {
        f"/{endpoint.name}": {"applied": list(endpoint.request.model_fields), "ignored": []}
        for endpoint in context.endpoints
    }


DIALECT = Dialect(make_routes, describe_paths, describe_fields)


def make_apis(context: DialectContext) -> dict[str, Any]:
    """Returns the APIs of a service, by the name of their path."""
    replay_request, empty_request = make_replay_model(context.limits), _make_empty_request()
    for request in (replay_request, empty_request):
        request.uploads = context.uploads
    return {
        **{endpoint.name: _make_task_api(context, endpoint) for endpoint in context.endpoints},
        "replay": _make_replay_api(context, replay_request),
        "adapters": _make_adapters_api(context, empty_request),
    }


def _make_task_api(context: DialectContext, endpoint: Endpoint) -> Any:
    async def generate(self: Any, ctx: bentoml.Context, **fields: Any) -> Image:
        del self
        if "refusal" in fields:
            return _answer(ctx, _refuse(endpoint.task, fields["refusal"]))
        call = Call(
            task=endpoint.task,
            arguments=to_arguments(fields),
            n=fields["n"],
            previews=Previews(is_full=False) if fields["previews"] else None,
            **_sender(ctx),
        )
        return _answer(ctx, await _run(context.dispatcher, ctx, call, fields["output_format"]))

    generate.__annotations__["return"] = _ANSWERS[endpoint.kind]
    generate.__name__ = endpoint.name
    generate.__doc__ = endpoint.description
    return bentoml.api(generate, input_spec=endpoint.request)


def _make_replay_api(context: DialectContext, request: type[RequestModel]) -> Any:
    async def replay(self: Any, ctx: bentoml.Context, **fields: Any) -> Image:
        """Generates again what a workflow says, or an image that holds one.

        Only what any request may ask for; it runs alone. The header `x-workflow-match` says
        if the image is the same.
        """
        del self
        if "refusal" in fields:
            return _answer(ctx, _refuse("replay", fields["refusal"]))
        call = ReplayCall(**fields, **_sender(ctx))
        return _answer(ctx, await _run(context.dispatcher, ctx, call, call.output_format))

    return bentoml.api(replay, input_spec=request)


def _make_adapters_api(context: DialectContext, request: type[RequestModel]) -> Any:
    @bentoml.api(input_spec=request)  # type: ignore[untyped-decorator]
    async def adapters(self: Any, ctx: bentoml.Context, **fields: Any) -> dict[str, Any]:
        """LoRAs and textual inversions: which can be named, are in memory, are in slots.

        Of the worker that answers: each has slots of its own.
        """
        del self
        if "refusal" in fields:
            return cast("dict[str, Any]", _answer(ctx, _refuse("adapters", fields["refusal"])))
        report = await asyncio.to_thread(context.dispatcher.engine.report)
        return asdict(report.adapters)

    return adapters


async def _run(
    dispatcher: Dispatcher, ctx: bentoml.Context, call: Call | ReplayCall, output: str | None
) -> Response:
    """Runs a call and answers as its client asks for it, or with an error as JSON."""
    accept, receive = ctx.request.headers.get("accept", ""), ctx.request.receive
    form = choose_form(accept)
    try:
        if isinstance(call, ReplayCall):
            answer = await dispatcher.replay(call, receive)
        elif form == "events":
            kind = dispatcher.engine.find_task(call.task).output.kind
            return await stream(dispatcher, call, receive, choose_format(kind, output, accept))
        else:
            answer = await dispatcher.run(call, receive)
        chosen = choose_format(kind_of(answer.results[0]), output, accept)
        return await make_response(dispatcher, answer, chosen, form)
    except DiffusersError as error:
        return error_response(error)


def _make_empty_request() -> type[RequestModel]:
    class Nothing(RequestModel):
        """A request without fields."""

    return Nothing


def _sender(ctx: bentoml.Context) -> dict[str, Any]:
    scope = ctx.request.scope
    return {"request_id": find_request_id(scope), "caller": Caller.of(scope)}


def _refuse(label: str, error: DiffusersError) -> Response:
    """Counts what is wrong with a request that could not be read, and answers with it."""
    process_metrics().note_error(label, error)
    return error_response(error)


def _answer(ctx: bentoml.Context, response: Response) -> Image:
    """Returns a response for BentoML, which puts a status of its own, 200, on each.

    By its annotation an API tells BentoML's clients that they get an image.
    """
    ctx.response.status_code = response.status_code
    return cast("Image", response)
