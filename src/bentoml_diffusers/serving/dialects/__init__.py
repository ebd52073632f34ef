"""The APIs that a service speaks.

Each translates requests into a :class:`~bentoml_diffusers.serving.calls.Call`, and answers and
events back. It knows nothing of engines, and holds no state.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.serving.dialects import huggingface, native, openai, replicate
from bentoml_diffusers.serving.dialects.context import Dialect, DialectContext
from bentoml_diffusers.serving.error_answers import error_response as native_error
from bentoml_diffusers.serving.openapi import Schemas, make_document, make_page_routes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.responses import Response

    from bentoml_diffusers.errors import DiffusersError

__all__ = [
    "DEFAULT_DIALECTS",
    "DialectContext",
    "answer_error",
    "choose_dialects",
    "make_apis",
    "make_app",
]

_DIALECTS: Mapping[str, Dialect] = {
    "native": native.DIALECT,
    "openai": openai.DIALECT,
    "huggingface": huggingface.DIALECT,
}
_JOB_DIALECTS: Mapping[str, Dialect] = {"replicate": replicate.DIALECT}  # where a service has jobs
DEFAULT_DIALECTS = tuple(_DIALECTS)


def choose_dialects(names: Sequence[str], *, has_jobs: bool = False) -> dict[str, Dialect]:
    """Returns dialects by their names, and those that jobs have.

    Raises:
        InvalidOption: 400, an unknown one, or none.
    """
    if isinstance(names, str) or not names or set(names) - set(_DIALECTS):
        raise InvalidOption("dialects", names, f"some of {', '.join(_DIALECTS)}")
    return {name: _DIALECTS[name] for name in names} | dict(_JOB_DIALECTS if has_jobs else {})


def make_apis(context: DialectContext) -> dict[str, Any]:
    """Returns the APIs of a BentoML service, which its clients in Python know by name."""
    return native.make_apis(context) if "native" in context.dialects else {}


def answer_error(path: str, error: DiffusersError) -> Response:
    """Returns the answer for a request that is not let in, in the form of its path's dialect."""
    is_openai = path.startswith("/v1/")
    return openai.error_response(error) if is_openai else native_error(error)


def make_app(context: DialectContext) -> Starlette:
    """Returns an app with the routes of all dialects, and the page that shows them."""

    @functools.cache
    def describe() -> dict[str, Any]:
        schemas = Schemas()
        paths = {
            path: item
            for dialect in context.dialects.values()
            for path, item in dialect.describe_paths(context, schemas).items()
        }
        return make_document(context.name, paths, schemas)

    routes = [
        route for dialect in context.dialects.values() for route in dialect.make_routes(context)
    ]
    return Starlette(routes=[*routes, *make_page_routes(context.name, describe)])
