"""Hugging Face's inference API: text or an image in, the bytes of an image out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.routing import Route

from bentoml_diffusers.errors import DiffusersError, InvalidRequest
from bentoml_diffusers.serving.answers import make_response
from bentoml_diffusers.serving.calls import Call, Caller
from bentoml_diffusers.serving.codecs import decode_base64, decode_image, fit_image
from bentoml_diffusers.serving.dialects.bodies import read_object
from bentoml_diffusers.serving.dialects.context import Dialect
from bentoml_diffusers.serving.dialects.names import EDIT, GENERATION, add_loras, find_task
from bentoml_diffusers.serving.error_answers import error_response
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.openapi.document import describe_errors
from bentoml_diffusers.serving.request_ids import find_request_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.codecs import OutputFormat
    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.openapi import Schemas
    from bentoml_diffusers.serving.openapi.document import Paths

# What a request may say and nothing here depends on, with the reason.
IGNORED = {
    "model": "the path has it",
    "options": "nothing is cached, and the model is loaded",
}
# What cannot be done, with the reason.
REFUSED = {"n": "an answer is one image", "previews": "an answer is one image"}
_IMAGE_HEADS = ("data:image/", "iVBORw0KGgo", "/9j/", "UklGR")  # PNG, JPEG, WebP in base64
_FORMATS: Mapping[str, OutputFormat] = {"image/jpeg": "jpeg", "image/webp": "webp"}


def make_routes(context: DialectContext) -> Sequence[BaseRoute]:
    """Returns the routes of the inference API, with and without the name of the model."""

    async def generate(request: Request) -> Response:
        try:
            body = await read_object(context, request, images=1)
            loras = context.served.read(request.path_params.get("model", ""))
            task, values = await asyncio.to_thread(translate, context.requests, body)
            values |= add_loras(loras, values)
            arguments = await context.dispatcher.read(task, values)
        except DiffusersError as error:
            process_metrics().note_error("huggingface", error)
            return error_response(error)
        call = Call(
            task=task,
            arguments=arguments,
            request_id=find_request_id(request.scope),
            caller=Caller.of(request.scope),
        )
        accepted = choose_format(request.headers.get("accept"))
        output_format = values.get("output_format") or accepted
        try:
            answer = await context.dispatcher.run(call, request.receive)
        except DiffusersError as error:
            return error_response(error)
        return await make_response(context.dispatcher, answer, output_format, "file")

    paths = ("/", "/models/{model:path}")
    return [Route(path, generate, methods=["POST"]) for path in paths]


def translate(requests: Mapping[str, Any], body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the task of a request, and values by the names of its native fields.

    An image comes with its prompt among the parameters; text has none there.

    Args:
        requests: What the service takes, by task.
        body: ``{"inputs": ..., "parameters": {...}}``.

    Raises:
        InvalidRequest: 400, a field that cannot be, or a broken image.
        UnsupportedOperation: 400, the model does not do it.
    """
    for name in body:
        if name not in ("inputs", "parameters", *IGNORED):
            raise InvalidRequest(name, body[name], "inputs and parameters only")
    inputs, parameters = body.get("inputs"), body.get("parameters") or {}
    if not isinstance(inputs, str):
        raise InvalidRequest("inputs", inputs, "a prompt, or an image in base64")
    if not isinstance(parameters, dict):
        raise InvalidRequest("parameters", parameters, "an object")
    _check_parameters(inputs, parameters)
    if parameters.get("prompt") is None:
        return find_task(requests, GENERATION), {**parameters, "prompt": inputs}
    task = find_task(requests, EDIT)
    own = {name: value for name, value in parameters.items() if name != "target_size"}
    image = _read_image(inputs, parameters.get("target_size"), requests[task].limits)
    return task, {**own, "image": image}


def _check_parameters(inputs: str, parameters: Mapping[str, Any]) -> None:
    for name, reason in REFUSED.items():
        if parameters.get(name) is not None:
            raise InvalidRequest(f"parameters.{name}", parameters[name], f"none: {reason}")
    prompt = parameters.get("prompt")
    is_image = inputs.startswith(_IMAGE_HEADS)
    if not isinstance(prompt, (str, type(None))) or (is_image and prompt is None):
        raise InvalidRequest("parameters.prompt", prompt, "the prompt for the image in inputs")


def choose_format(accept: str | None) -> OutputFormat:
    """Returns the format for a header ``Accept``; PNG where it takes any."""
    names = [part.split(";")[0].strip().lower() for part in (accept or "").split(",")]
    return next((_FORMATS[name] for name in names if name in _FORMATS), "png")


def _read_image(text: str, size: Any, limits: RequestLimits) -> Image:
    field = "inputs"
    try:
        image = decode_image(decode_base64(text), limits)
        if size is None:
            return image
        field = "parameters.target_size"
        return fit_image(image, _read_size(size), limits)
    except ValueError as err:
        raise InvalidRequest(field, "an image" if field == "inputs" else size, str(err)) from err


def _read_size(size: Any) -> tuple[int, int]:
    width, height = (size.get("width"), size.get("height")) if isinstance(size, dict) else (0, 0)
    if type(width) is not int or type(height) is not int:
        raise ValueError("an object with width and height in pixels")
    return width, height


_STATUSES = (400, 403, 404, 405, 415, 429, 500, 503, 504)
_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "inputs": {"type": "string", "description": "The prompt, or an image in base64."},
        "parameters": {
            "type": "object",
            "description": "Fields of the native API; with an image its `prompt`.",
            "additionalProperties": True,
        },
    },
}
_EXAMPLE = {"inputs": "a big red circle on a blue background at the left"}


def describe_fields(context: DialectContext) -> Mapping[str, Any]:
    """Returns the fields of the inference API; its parameters are fields of the native one."""
    del context
    return {"/": {"applied": ["inputs", "parameters"], "refused": REFUSED, "ignored": IGNORED}}


def describe_paths(context: DialectContext, schemas: Schemas) -> Paths:
    """Returns the paths of the inference API."""
    del context
    body = {"schema": schemas.add("HuggingFaceRequest", _BODY), "example": _EXAMPLE}
    image = {"schema": {"type": "string", "format": "binary"}}
    content = {f"image/{name}": image for name in ("png", "jpeg", "webp")}
    operation = {
        "summary": "An image, as Hugging Face's inference API",
        "tags": ["huggingface"],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "The image.", "content": content},
            **describe_errors(_STATUSES),
        },
    }
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    named = {**operation, "operationId": "huggingface_model", "parameters": [model]}
    return {
        "/": {"post": {**operation, "operationId": "huggingface"}},
        "/models/{model}": {"post": named},
    }


DIALECT = Dialect(make_routes, describe_paths, describe_fields)
