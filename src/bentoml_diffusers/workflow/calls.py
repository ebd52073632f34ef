"""What can be repeated: workflows, and methods of a pipeline that paint."""

from __future__ import annotations

import inspect
from typing import Any

from bentoml_diffusers.errors import InvalidRequest, InvalidWorkflow
from bentoml_diffusers.workflow.schema import Workflow


def check_workflow(value: object) -> None:
    """Refuses what is no workflow, such as the path of one.

    Raises:
        InvalidRequest: 400, something else.
    """
    if not isinstance(value, Workflow):
        raise InvalidRequest("workflow", value, "a Workflow, as Workflow.load returns it")


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
