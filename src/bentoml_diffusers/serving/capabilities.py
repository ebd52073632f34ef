"""What a service can: for programs that choose fields, adapters and models by themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import find_version
from bentoml_diffusers.engine.requests import list_scheduler_names
from bentoml_diffusers.serving.answers import MEDIA_TYPES
from bentoml_diffusers.serving.codecs import FORMATS_BY_KIND
from bentoml_diffusers.serving.openapi import Schemas

if TYPE_CHECKING:
    from bentoml_diffusers.serving.dialects.context import DialectContext
    from bentoml_diffusers.serving.endpoints import Endpoint


def describe_model(context: DialectContext) -> dict[str, Any]:
    """Returns the model that a service has loaded."""
    pipeline = context.dispatcher.engine.pipeline
    return {
        "id": f"{context.served.name}:{context.served.version}",
        "pipeline_class": type(pipeline).__name__,
    }


def describe_capabilities(context: DialectContext) -> dict[str, Any]:
    """Returns what a service takes and makes. Looks at the files of adapters."""
    engine = context.dispatcher.engine
    adapters = engine.report().adapters
    return {
        "service": context.name,
        "version": find_version("bentoml-diffusers"),
        "model": describe_model(context),
        "tasks": {one.name: _describe_task(one, context) for one in context.endpoints},
        "schedulers": list_scheduler_names(getattr(engine.pipeline, "scheduler", None)),
        "adapters": {
            "lora_weights": list(adapters.known),
            "textual_inversions": list(adapters.known_inversions),
        },
        "formats": {
            **{f"{kind}s": list(names) for kind, names in FORMATS_BY_KIND.items()},
            "answers": list(MEDIA_TYPES),
        },
        "limits": {**asdict(context.limits), **asdict(engine.limits)},
        "dialects": {
            name: dialect.describe_fields(context) for name, dialect in context.dialects.items()
        },
    }


def _describe_task(endpoint: Endpoint, context: DialectContext) -> dict[str, Any]:
    schemas = Schemas()
    schemas.add_request(endpoint.request)
    whole = schemas.components[str(endpoint.request.model_json_schema()["title"])]
    output = context.dispatcher.engine.find_task(endpoint.task).output
    return {
        "path": f"/{endpoint.name}",
        "output": output.kind,
        "required": whole.get("required", []),
        "fields": whole["properties"],
    }
