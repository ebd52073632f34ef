"""The document: what each path takes and answers, with its statuses and headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import find_version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bentoml_diffusers.serving.openapi.schemas import Schema, Schemas

Paths = dict[str, dict[str, Any]]

_REASONS = {
    400: "A field is wrong, or the body cannot be read.",
    403: "Another host or another site than may ask the service.",
    404: "There is no LoRA, textual inversion or request of that name.",
    405: "Another method than the path has.",
    409: "The workflow was made with another model, other code or other adapters.",
    415: "A body that is neither JSON nor a form.",
    429: "Too many requests wait.",
    500: "The pipeline failed; the server's log says why.",
    503: "Cancelled, the service ends, or there is no room for the request now.",
    504: "Not done in time.",
}
_RETRY_AFTER = {
    "retry-after": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_REQUEST_ID = {
    "x-request-id": {
        "description": "That of the request, or one that was made for it.",
        "schema": {"type": "string"},
    }
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "string", "description": "What is wrong."},
        "detail": {
            "type": "array",
            "description": "Each field that is wrong.",
            "items": {
                "type": "object",
                "required": ["loc", "msg"],
                "properties": {
                    "loc": {
                        "type": "array",
                        "description": "The path to the field.",
                        "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                    },
                    "msg": {"type": "string"},
                },
            },
        },
    },
    "example": {
        "error": "num_inference_steps: Input should be less than or equal to 150",
        "detail": [
            {
                "loc": ["num_inference_steps"],
                "msg": "Input should be less than or equal to 150",
            }
        ],
    },
}


def make_document(name: str, paths: Paths, schemas: Schemas) -> dict[str, Any]:
    """Returns a document of OpenAPI 3.0.3.

    Args:
        name: Of the service.
        paths: Of the dialects.
        schemas: That they name.
    """
    schemas.add("Error", _ERROR)
    return {
        "openapi": "3.0.3",
        "info": {
            "title": name,
            "version": find_version("bentoml-diffusers") or "0",
            "description": "Images by diffusers pipelines, served by bentoml-diffusers.",
        },
        "servers": [{"url": "."}],
        "paths": {**paths, **_infrastructure_paths()},
        "components": {"schemas": dict(sorted(schemas.components.items()))},
    }


def describe_errors(statuses: Iterable[int], name: str = "Error") -> dict[str, Any]:
    """Returns the answers of an operation that are errors.

    Args:
        statuses: Which there are.
        name: Of the schema of their JSON.
    """
    return {str(status): _describe_error(status, name) for status in statuses}


def _describe_error(status: int, name: str) -> dict[str, Any]:
    media_type = "text/plain" if status == 405 else "application/json"
    schema = {"type": "string"} if status == 405 else {"$ref": f"#/components/schemas/{name}"}
    headers = {**_REQUEST_ID, **(_RETRY_AFTER if status in (429, 503) else {})}
    return {
        "description": _REASONS[status],
        "headers": headers,
        "content": {media_type: {"schema": schema}},
    }


def _infrastructure_paths() -> Paths:
    plain = {"text/plain": {"schema": {"type": "string"}}}
    texts = {
        "/livez": "The process lives.",
        "/readyz": "The service is ready.",
        "/metrics": "What Prometheus reads.",
    }
    return {
        path: {
            "get": {
                "operationId": path.strip("/"),
                "summary": text,
                "tags": ["infrastructure"],
                "responses": {
                    "200": {"description": text, "content": plain},
                    **({"503": {"description": "Not yet."}} if path == "/readyz" else {}),
                },
            }
        }
        for path, text in texts.items()
    }
