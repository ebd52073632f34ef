"""Methods of a pipeline as tasks: which ones are self-contained.

A request runs on its own view, so what a method stores in the pipeline for a later call is lost
with the request: the inversion of LEDITS++, or a setting such as ``set_pag_applied_layers``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline


def check_method(pipeline: DiffusionPipeline, name: str) -> None:
    """Refuses a method that prepares a later call, or needs such a preparation.

    Raises:
        InvalidRequest: 400, what the method stores for a later call would be lost, or it needs
            what another method stores.
    """
    if name == "__call__":
        _check_preparation(pipeline)
        return
    cls: Any = type(pipeline)
    left = _left_for_call(cls, name)
    if left:
        raise InvalidRequest(
            "task",
            name,
            f"a self-contained method: what {name} stores for __call__ "
            f"({', '.join(sorted(left))}) would be lost with the request; call it on the pipeline "
            "before the engine gets it",
        )


def _check_preparation(pipeline: DiffusionPipeline) -> None:
    cls: Any = type(pipeline)
    for name, left in _preparations(cls):
        missing = sorted(part for part in left if getattr(pipeline, part, None) is None)
        if missing:
            raise InvalidRequest(
                "task",
                "__call__",
                f"another method: this one needs what {cls.__name__}.{name} stores in the pipeline "
                f"({', '.join(missing)}); call {name} before the engine gets the pipeline, "
                "or use diffusers' own call",
            )


@functools.lru_cache(maxsize=256)
def _preparations(cls: Any) -> tuple[tuple[str, frozenset[str]], ...]:
    """Methods that generate, such as ``invert``, and the attributes they set for ``__call__``."""
    names = [name for name in dir(cls) if not name.startswith("_") and _takes_generator(cls, name)]
    found = [(name, _left_for_call(cls, name)) for name in names]
    return tuple((name, left) for name, left in found if left)


def _takes_generator(cls: type[Any], name: str) -> bool:
    method = inspect.getattr_static(cls, name)
    return inspect.isfunction(method) and "generator" in inspect.signature(method).parameters


@functools.lru_cache(maxsize=256)
def _left_for_call(cls: Any, name: str) -> frozenset[str]:
    """Attributes that a method sets, and that ``__call__`` reads but does not set itself."""
    method = inspect.getattr_static(cls, name)
    if not inspect.isfunction(method):
        return frozenset()
    written, _ = _attributes(method)
    own, read = _attributes(cls.__call__) if written else (frozenset(), frozenset())
    return (written & read) - own


def _attributes(method: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes of ``self`` that a method's own code sets and reads."""
    try:
        source = inspect.getsource(inspect.unwrap(method))
        nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    except (OSError, TypeError, SyntaxError):  # without its source nothing is known
        return frozenset(), frozenset()
    found = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]
    written = frozenset(node.attr for node in found if isinstance(node.ctx, ast.Store))
    return written, frozenset(node.attr for node in found if isinstance(node.ctx, ast.Load))
