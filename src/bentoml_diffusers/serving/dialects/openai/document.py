"""The paths of OpenAI's images API, for the document, and what becomes of their fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.serving.answers import EVENTS
from bentoml_diffusers.serving.dialects.openai.fields import (
    IGNORED,
    REFUSED,
    EditRequest,
    ImageRequest,
)
from bentoml_diffusers.serving.openapi.document import describe_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.openapi.document import Paths
    from bentoml_diffusers.serving.openapi.schemas import Schema, Schemas

_STATUSES = (400, 403, 404, 405, 415, 429, 500, 503, 504)
_TAGS = ["openai"]
_ERROR_NAME = "OpenAIError"
_FILE: Schema = {"type": "string", "format": "binary"}
_TEXT: Schema = {"type": "string"}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["message", "type"],
                    "properties": {
                        "message": _TEXT,
                        "type": _TEXT,
                        "param": {"type": "string", "nullable": True},
                        "code": {"type": "string", "nullable": True},
                    },
                },
                {**_TEXT, "description": "Of what refuses a request before it is read."},
            ]
        }
    },
}
_IMAGES: Schema = {
    "type": "object",
    "required": ["created", "data"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"b64_json": _TEXT, "seed": {"type": "integer"}},
            },
        },
    },
    "additionalProperties": True,
}
_MODEL: Schema = {
    "type": "object",
    "required": ["id", "object"],
    "properties": {
        "id": _TEXT,
        "object": _TEXT,
        "created": {"type": "integer"},
        "owned_by": _TEXT,
    },
}
_MODELS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": _TEXT,
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/OpenAIModel"}},
    },
}


def describe_fields(context: DialectContext) -> Mapping[str, Any]:
    """Returns the fields of the images API: applied, refused and ignored, with reasons.

    Those of the native API are applied, too.
    """
    del context
    shared = {"refused": REFUSED, "ignored": IGNORED}
    edit = [name for name in EditRequest.model_fields if name not in IGNORED]
    generation = [name for name in ImageRequest.model_fields if name not in IGNORED]
    return {
        "/v1/images/generations": {"applied": generation, **shared},
        "/v1/images/edits": {"applied": edit, **shared},
        "/v1/images/variations": {"applied": edit, **shared},
    }


def describe_paths(context: DialectContext, schemas: Schemas) -> Paths:
    """Returns the paths of the images API."""
    del context
    schemas.add(_ERROR_NAME, _ERROR)
    schemas.add("OpenAIImages", _IMAGES)
    schemas.add("OpenAIModel", _MODEL)
    body = {"schema": schemas.add_model("OpenAIGeneration", ImageRequest), "example": _EXAMPLE}
    form = {"schema": _add_form(schemas)}
    return {
        "/v1/images/generations": _describe_images("generations", {"application/json": body}),
        "/v1/images/edits": _describe_images("edits", {"multipart/form-data": form}),
        "/v1/images/variations": _describe_images("variations", {"multipart/form-data": form}),
        "/v1/models": {"get": _describe_get("list_models", "Models, with each LoRA.", _MODELS)},
        "/v1/models/{model}": {
            "get": {
                **_describe_get(
                    "get_model", "One model.", {"$ref": "#/components/schemas/OpenAIModel"}
                ),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": _TEXT},
                ],
            }
        },
    }


def _add_form(schemas: Schemas) -> Schema:
    reference = schemas.add_model("OpenAIEdit", EditRequest)
    properties = schemas.components["OpenAIEdit"]["properties"]
    properties["image"] = {**_FILE, "description": "One; clients may call it `image[]`."}
    properties["mask"] = {**_FILE, "description": "Transparent where to generate."}
    return reference


def _describe_images(name: str, content: dict[str, Any]) -> dict[str, Any]:
    images = {"schema": {"$ref": "#/components/schemas/OpenAIImages"}}
    done = {
        "description": "Images in base64; with `stream` events with partial and final images.",
        "content": {"application/json": images, EVENTS: {"schema": _TEXT}},
    }
    operation = {
        "operationId": f"openai_{name}",
        "summary": f"Images, as OpenAI's `/v1/images/{name}`",
        "tags": _TAGS,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": done, **describe_errors(_STATUSES, _ERROR_NAME)},
    }
    return {"post": operation}


def _describe_get(name: str, text: str, schema: Schema) -> dict[str, Any]:
    return {
        "operationId": f"openai_{name}",
        "summary": text,
        "tags": _TAGS,
        "responses": {
            "200": {"description": text, "content": {"application/json": {"schema": schema}}},
            **describe_errors((403, 404, 405), _ERROR_NAME),
        },
    }


_EXAMPLE = {"prompt": "a big red circle on a blue background at the left", "n": 1}
