"""The APIs that a service speaks.

Each is a module that translates requests into a :class:`~bentoml_diffusers.serving.calls.Call`,
and answers and events back. It knows nothing of engines, and holds no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.serving.dialects import huggingface, native, openai
from bentoml_diffusers.serving.dialects.context import DialectContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DEFAULT_DIALECTS", "DialectContext", "check_dialects", "make_apis", "make_app"]

# Each module has `make_routes(context)`, Starlette's routes; their bodies are read with
# `context.uploads.bound`.
_MODULES: Mapping[str, Any] = {"native": native, "openai": openai, "huggingface": huggingface}
DEFAULT_DIALECTS = tuple(_MODULES)


def check_dialects(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of dialects.

    Raises:
        InvalidOption: 400, an unknown one, or none.
    """
    unknown = [name for name in names if name not in _MODULES]
    if unknown or not names or isinstance(names, str):
        raise InvalidOption("dialects", names, f"some of {', '.join(_MODULES)}")
    return tuple(names)


def make_apis(context: DialectContext) -> dict[str, Any]:
    """Returns the APIs of a BentoML service, which its clients in Python know by name."""
    return native.make_apis(context) if "native" in context.dialects else {}


def make_app(context: DialectContext) -> Starlette:
    """Returns an app with the routes of all dialects of a service."""
    routes = [route for name in context.dialects for route in _MODULES[name].make_routes(context)]
    return Starlette(routes=routes)
