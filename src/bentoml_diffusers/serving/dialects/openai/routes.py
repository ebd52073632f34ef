"""The paths of OpenAI's images API, and what they answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.answers import describe_headers
from bentoml_diffusers.serving.calls import Call, Caller, Previews
from bentoml_diffusers.serving.dialects.bodies import FORMS, media_type, read_form, read_object
from bentoml_diffusers.serving.dialects.names import UnknownModel
from bentoml_diffusers.serving.dialects.openai.errors import FieldsRefused, error_response
from bentoml_diffusers.serving.dialects.openai.fields import EditRequest, ImageRequest
from bentoml_diffusers.serving.dialects.openai.forms import fold_form
from bentoml_diffusers.serving.dialects.openai.orders import Order, Translator
from bentoml_diffusers.serving.dialects.openai.streams import answer_stream
from bentoml_diffusers.serving.dialects.openai.wire import describe_images
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.request_ids import find_request_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from bentoml_diffusers.serving.dialects.context import DialectContext

_FILES = ("image", "image[]", "mask", "markup")
_MAX_FILES = 2  # of full size: image and mask


def make_routes(context: DialectContext) -> Sequence[BaseRoute]:
    """Returns the routes of the images API."""
    edit, generation = EditRequest, ImageRequest
    return [
        _route(context, "/v1/images/generations", generation, Translator.generation),
        _route(context, "/v1/images/edits", edit, Translator.edit),
        _route(context, "/v1/images/variations", edit, Translator.variation),
        Route("/v1/models", _make_list(context), methods=["GET"]),
        Route("/v1/models/{model:path}", _make_get(context), methods=["GET"]),
    ]


def _route(
    context: DialectContext,
    path: str,
    model: type[ImageRequest],
    translate: Callable[[Translator, Any], Order],
) -> Route:
    async def generate(request: Request) -> Response:
        order = None
        try:
            fields = await _read_fields(context, request, model)
            translator = Translator(context.requests, context.served, context.openai.quality_steps)
            order = await asyncio.to_thread(translate, translator, fields)
            arguments = await context.dispatcher.read(order.task, order.values)
        except DiffusersError as error:
            process_metrics().note_error(order.task if order else "openai", error)
            return error_response(error, order.names if order else None)
        return await _run(context, request, order, order.complete(arguments))

    return Route(path, generate, methods=["POST"])


async def _read_fields(
    context: DialectContext, request: Request, model: type[ImageRequest]
) -> ImageRequest:
    """Reads a body: files come in a form, and a request without files in either form.

    Raises:
        FieldsRefused: 400, wrong fields.
        DiffusersError: As :func:`read_form` and :func:`read_object`.
    """
    if model is EditRequest or media_type(request) in FORMS:
        values = fold_form(await read_form(context, request, _FILES, _MAX_FILES))
    else:
        values = await read_object(context, request)
    given = {name: value for name, value in values.items() if value not in (None, "")}
    try:
        return model.model_validate(given)
    except ValidationError as err:
        raise FieldsRefused.of(err) from err


async def _run(
    context: DialectContext, request: Request, order: Order, arguments: dict[str, Any]
) -> Response:
    asked = order.request
    call = Call(
        task=order.task,
        arguments=arguments,
        n=asked.n,
        previews=_choose_previews(asked),
        request_id=find_request_id(request.scope),
        caller=Caller.of(request.scope),
    )
    if asked.stream:
        return await answer_stream(context.dispatcher, call, order, request.receive)
    try:
        answer = await context.dispatcher.run(call, request.receive)
    except DiffusersError as error:
        return error_response(error, order.names)
    encode = context.dispatcher.encode
    encoded = await asyncio.gather(
        *(encode(result, asked.output_format, asked.compression) for result in answer.results)
    )
    size = answer.results[0].images[0].size
    body = describe_images(asked, [one.data for one in encoded], size, answer.seeds)
    return JSONResponse(body, headers=describe_headers(answer))


def _choose_previews(request: ImageRequest) -> Previews | None:
    count = request.partial_images if request.stream else 0
    return Previews(count=count, interval_s=0) if count else None


def _make_list(context: DialectContext) -> Any:
    async def list_models(request: Request) -> Response:
        """Lists the model of the service, also with each LoRA that can be named."""
        del request
        names = context.served.list_names(await _list_loras(context))
        data = [context.served.describe(name) for name in names]
        return JSONResponse({"object": "list", "data": data})

    return list_models


def _make_get(context: DialectContext) -> Any:
    async def get_model(request: Request) -> Response:
        """Describes one model, also one with several LoRAs."""
        name = request.path_params["model"]
        try:
            loras = context.served.read(name)
            if not set(loras) <= set(await _list_loras(context)):
                raise UnknownModel(name, context.served.name)
        except UnknownModel as error:
            return error_response(error)
        return JSONResponse(context.served.describe(name))

    return get_model


async def _list_loras(context: DialectContext) -> Sequence[str]:
    """Returns the LoRAs that a request may name. Looks at the disk, beside the event loop."""
    report = await asyncio.to_thread(context.dispatcher.engine.report)
    return report.adapters.known
