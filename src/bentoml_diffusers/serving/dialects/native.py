"""The API of this package: a path for each task, with the fields of its pipeline."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import bentoml
from PIL.Image import Image  # noqa: TC002 - BentoML reads the annotations of an API

from bentoml_diffusers._compat import api_with_headers
from bentoml_diffusers.serving.answers import HEADERS, REPLAY_HEADERS, answer, error_response
from bentoml_diffusers.serving.calls import Call, Caller
from bentoml_diffusers.serving.choices import to_arguments
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.reader import RequestModel
from bentoml_diffusers.serving.replays import ReplayCall, make_replay_model
from bentoml_diffusers.serving.request_ids import find_request_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from bentoml_diffusers.errors import DiffusersError
    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.endpoints import Endpoint


def make_routes(context: DialectContext) -> Sequence[BaseRoute]:
    """Returns what the service answers beside its APIs."""
    del context
    return []


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
        call = Call(task=endpoint.task, arguments=to_arguments(fields), **_sender(ctx))
        work = context.dispatcher.run(call, ctx.request.receive)
        return _answer(ctx, await answer(context.dispatcher, work, fields["output_format"]))

    generate.__name__ = endpoint.name
    generate.__doc__ = endpoint.description
    return api_with_headers(HEADERS, input_spec=endpoint.request)(generate)


def _make_replay_api(context: DialectContext, request: type[RequestModel]) -> Any:
    async def replay(self: Any, ctx: bentoml.Context, **fields: Any) -> Image:
        """Generates again what a workflow says, or an image that holds one.

        Only what any request may ask for; it runs alone. The header `x-workflow-match` says
        if the image is the same.
        """
        del self
        if "refusal" in fields:
            return _answer(ctx, _refuse("replay", fields["refusal"]))
        output_format = fields.pop("output_format")
        work = context.dispatcher.replay(ReplayCall(**fields, **_sender(ctx)), ctx.request.receive)
        return _answer(ctx, await answer(context.dispatcher, work, output_format))

    return api_with_headers(REPLAY_HEADERS, input_spec=request)(replay)


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
