"""What stands between a client and the endpoints, in the order in which a request passes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware

from bentoml_diffusers.serving.access import AccessOptions
from bentoml_diffusers.serving.authentication import Authentication
from bentoml_diffusers.serving.dialects import answer_error
from bentoml_diffusers.serving.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Collection

    from bentoml_diffusers.serving.access import KeyOptions

OPEN = AccessOptions()
# What a page of another site may read of an answer.
_EXPOSED = ("retry-after", "x-request-id", "x-seed", "x-warnings", "x-workflow-match")


def list_guards(
    service_name: str,
    allowed_hosts: Collection[str] | None,
    keys: KeyOptions | None,
    access: AccessOptions,
) -> list[tuple[type[Any], dict[str, Any]]]:
    """Returns the ASGI middlewares of a service and their arguments, the outermost first.

    BentoML's own ``http.cors`` stands behind all of them: a page could not read their refusals.
    """
    origins = list(access.cors_origins)
    cors = {
        "allow_origins": origins,
        "allow_methods": ["GET", "POST", "DELETE"],
        "allow_headers": ["*"],
        "expose_headers": _EXPOSED,
    }
    gate = {"service_name": service_name, "allowed_hosts": allowed_hosts, "cors_origins": origins}
    guards: list[tuple[type[Any], dict[str, Any]]] = [(CORSMiddleware, cors)] if origins else []
    return [
        *guards,
        (Gate, gate),
        (Authentication, {"access": access, "keys": keys, "answer": answer_error}),
    ]
