"""The paths of the native API, for the OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.serving.answers import EVENTS, HEADERS, REPLAY_HEADERS
from bentoml_diffusers.serving.codecs import FORMATS_BY_KIND, media_type_of
from bentoml_diffusers.serving.openapi.document import describe_errors
from bentoml_diffusers.serving.replays import make_replay_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.endpoints import Endpoint
    from bentoml_diffusers.serving.openapi.document import Paths
    from bentoml_diffusers.serving.openapi.schemas import Schema, Schemas
    from bentoml_diffusers.serving.reader import RequestModel

_STATUSES = (400, 403, 404, 405, 415, 429, 500, 503, 504)
_TAG = ["generation"]
_BINARY: Schema = {"type": "string", "format": "binary"}
_EVENTS: Schema = {
    "type": "string",
    "description": "Events queued, progress, preview, image (or video, or audio) and done, or "
    "error; each with JSON.",
}


def describe_paths(context: DialectContext, schemas: Schemas) -> Paths:
    """Returns the paths of the native API.

    Args:
        context: The service.
        schemas: Gets those that the paths name.
    """
    schemas.add("Answer", _ANSWER)
    schemas.add("Model", _MODEL)
    return {
        **{f"/{one.name}": _describe_endpoint(one, schemas) for one in context.endpoints},
        "/replay": _describe_replay(make_replay_model(context.limits), schemas),
        "/adapters": _describe_adapters(),
        "/capabilities": _describe_get(
            "capabilities", "What the service can: tasks, fields, limits, adapters.", _ANYTHING
        ),
        "/models": _describe_get("models", "The model of the service.", _MODELS),
        "/requests/{request_id}/cancel": _describe_cancel(),
    }


def _describe_endpoint(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any]:
    request = endpoint.request
    media_types = {"application/json": _json_body(request, schemas), **_form(request, schemas)}
    operation = {
        "operationId": endpoint.name,
        "summary": endpoint.description.partition(". ")[0],
        "description": endpoint.description,
        "tags": _TAG,
        "parameters": _PARAMETERS,
        "requestBody": {"required": True, "content": _prefer_form(request, media_types)},
        "responses": {
            "200": _describe_files(endpoint.kind, HEADERS, with_events=True),
            **describe_errors(_STATUSES),
        },
    }
    return {"post": operation}


def _describe_replay(request: type[RequestModel], schemas: Schemas) -> dict[str, Any]:
    media_types = {"application/json": _json_body(request, schemas), **_form(request, schemas)}
    operation = {
        "operationId": "replay",
        "summary": "Generates again what a workflow says, or an image that holds one",
        "description": "Only what any request may ask for; it runs alone. The header "
        "`x-workflow-match` says if the image is the same.",
        "tags": _TAG,
        "parameters": _PARAMETERS,
        "requestBody": {"required": True, "content": _prefer_form(request, media_types)},
        "responses": {
            "200": _describe_files(None, REPLAY_HEADERS, with_events=False),
            **describe_errors(sorted((*_STATUSES, 409))),
        },
    }
    return {"post": operation}


def _describe_adapters() -> dict[str, Any]:
    schema = {"type": "object", "additionalProperties": False}
    body = {"application/json": {"schema": schema, "example": {}}}
    operation = {
        "operationId": "adapters",
        "summary": "LoRAs and textual inversions: which can be named, are in memory, are in slots",
        "description": "Of the worker that answers: each has slots of its own.",
        "tags": ["service"],
        "requestBody": {"required": False, "content": body},
        "responses": {"200": _describe_json(_ANYTHING), **describe_errors((400, 403, 405, 415))},
    }
    return {"post": operation}


def _describe_get(name: str, text: str, schema: Schema) -> dict[str, Any]:
    operation = {
        "operationId": name,
        "summary": text,
        "tags": ["service"],
        "responses": {"200": _describe_json(schema), **describe_errors((403, 405))},
    }
    return {"get": operation}


def _describe_cancel() -> dict[str, Any]:
    parameter = {
        "name": "request_id",
        "in": "path",
        "required": True,
        "description": "The `x-request-id` of the request.",
        "schema": {"type": "string"},
    }
    operation = {
        "operationId": "cancel",
        "summary": "Stops a request of the same caller, within one denoising step",
        "description": "Of the worker that answers. The request itself is answered with 503.",
        "tags": ["service"],
        "parameters": [parameter],
        "responses": {"200": _describe_json(_CANCELLED), **describe_errors((403, 404, 405))},
    }
    return {"post": operation}


def _json_body(request: type[RequestModel], schemas: Schemas) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": schemas.add_request(request)}
    example = {
        name: field.examples[0]
        for name, field in request.model_fields.items()
        if field.examples and (field.is_required() or name in _IN_EXAMPLE)
    }
    return {**body, "example": example} if example else body


def _form(request: type[RequestModel], schemas: Schemas) -> dict[str, Any]:
    schema = schemas.add_request(request, is_form=True)
    fields = schemas.components[schema["$ref"].rpartition("/")[2]]["properties"]
    structures = [name for name, one in fields.items() if one.get("type") in ("array", "object")]
    encoding = {name: {"contentType": "application/json"} for name in structures}
    return {
        "multipart/form-data": {"schema": schema, **({"encoding": encoding} if encoding else {})}
    }


def _prefer_form(request: type[RequestModel], media_types: dict[str, Any]) -> dict[str, Any]:
    """Pages and generators take the first: a form where there are files."""
    order = sorted(
        media_types, key=lambda one: (one == "application/json") == bool(request.multipart_fields)
    )
    return {name: media_types[name] for name in order}


def _describe_files(
    kind: str | None, headers: Mapping[str, str], *, with_events: bool
) -> dict[str, Any]:
    kinds = FORMATS_BY_KIND if kind is None else {kind: FORMATS_BY_KIND[kind]}
    types = [media_type_of(kind, name) for kind, names in kinds.items() for name in names]
    files = dict.fromkeys(types, {"schema": _BINARY})  # noqa: RUF024 - nobody changes it
    several = {name: {"schema": _BINARY} for name in ("application/zip", "multipart/mixed")}
    answer = {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}}
    events = {EVENTS: {"schema": _EVENTS}} if with_events else {}
    return {
        "description": "The file; or what `Accept` asks for: a zip (so it is for several files), "
        "parts, JSON with files in base64, or events while it is made.",
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        },
        "content": {**files, **several, **answer, **events},
    }


def _describe_json(schema: Schema) -> dict[str, Any]:
    return {"description": "Done.", "content": {"application/json": {"schema": schema}}}


_IN_EXAMPLE = ("num_inference_steps", "seed", "output_format")
_PARAMETERS = [
    {
        "name": "x-request-id",
        "in": "header",
        "required": False,
        "description": "By which the request can be cancelled: letters, digits and `._:-`.",
        "schema": {"type": "string", "maxLength": 128},
    }
]
_ANYTHING: Schema = {"type": "object", "additionalProperties": True}
_CANCELLED: Schema = {
    "type": "object",
    "required": ["request_id", "cancelled"],
    "properties": {"request_id": {"type": "string"}, "cancelled": {"type": "boolean"}},
}
_MODEL: Schema = {
    "type": "object",
    "required": ["id", "pipeline_class"],
    "properties": {
        "id": {"type": "string", "description": "Its tag in the store."},
        "pipeline_class": {"type": "string"},
    },
}
_MODELS: Schema = {
    "type": "object",
    "required": ["models"],
    "properties": {"models": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}},
}
_NUMBER: Schema = {"type": "number"}
_FILE: Schema = {
    "type": "object",
    "required": ["media_type", "seed", "data"],
    "properties": {
        "data": {"type": "string", "format": "byte", "description": "The file in base64."},
        "media_type": {"type": "string"},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "frames": {"type": "integer"},
        "fps": _NUMBER,
        "seconds": _NUMBER,
        "has_sound": {"type": "boolean"},
        "sampling_rate": {"type": "integer"},
        "channels": {"type": "integer"},
        "seed": {"type": "integer", "nullable": True, "description": "Makes this file again."},
        "nsfw_content_detected": {"type": "boolean", "nullable": True},
        "workflow_embedded": {"type": "boolean", "nullable": True},
        "workflow_match": {"type": "boolean", "nullable": True},
    },
}
_ANSWER: Schema = {
    "type": "object",
    "required": ["request_id"],
    "properties": {
        "request_id": {"type": "string"},
        **{f"{kind}s": {"type": "array", "items": _FILE} for kind in FORMATS_BY_KIND},
        "scheduler": {"type": "string", "description": "Class of the scheduler."},
        "steps": {"type": "integer", "description": "Denoising steps done."},
        "adapters": {"type": "array", "items": {"type": "string"}},
        "batches": {
            "type": "object",
            "description": "How many forwards were shared by how many requests.",
            "additionalProperties": {"type": "integer"},
        },
        "queue_s": {**_NUMBER, "description": "Seconds that it waited."},
        "run_s": {**_NUMBER, "description": "Seconds that it ran."},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}
