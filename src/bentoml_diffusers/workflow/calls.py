"""Which methods of a pipeline a workflow may name, which may be a stranger's."""

from __future__ import annotations

import inspect
from typing import Any

from bentoml_diffusers.errors import InvalidWorkflow


def check_method(cls: type[Any], name: str) -> None:
    """Refuses all but methods that paint: ``__call__``, and public ones that take a generator.

    Raises:
        InvalidWorkflow: 400, another one, such as ``save_pretrained``.
    """
    if name == "__call__":
        return
    method = None if name.startswith("_") else getattr(cls, name, None)
    if not inspect.isfunction(method) or "generator" not in inspect.signature(method).parameters:
        raise InvalidWorkflow(
            "workflow.pipeline.method", name, f"a method of {cls.__name__} that takes a generator"
        )
