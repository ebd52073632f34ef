"""A call, before it runs, as a workflow."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.workflow.describing import is_modular
from bentoml_diffusers.workflow.outputs import hash_output
from bentoml_diffusers.workflow.schema import Workflow
from bentoml_diffusers.workflow.values import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def complete_arguments(
    pipeline: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a call by name, defaults included.

    Raises:
        TypeError: The method does not take them.
    """
    if is_modular(pipeline) and method == "__call__":
        inputs = {item.name: item.default for item in pipeline.blocks.inputs if item.name}
        return {**inputs, "output": None, **kwargs}
    signature = inspect.signature(getattr(type(pipeline), method))
    bound = signature.bind(pipeline, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])
    for name, item in signature.parameters.items():
        if item.kind is item.VAR_KEYWORD:
            arguments |= arguments.pop(name)
        if item.kind is item.VAR_POSITIONAL:
            arguments.pop(name)
    return arguments


def capture(arguments: Mapping[str, Any], **fields: Any) -> Workflow:
    """Returns the workflow of a call that is about to run.

    Args:
        arguments: All of them; read now, since a pipeline may change them.
        **fields: Other fields of the workflow.
    """
    encoder = Encoder()
    kept, unsupported = encoder.encode_all(arguments)
    workflow = Workflow(
        arguments=kept, unsupported=unsupported, generators=encoder.generators, **fields
    )
    return workflow.with_blobs(encoder.blobs)


def complete(workflow: Workflow, output: Any, *, batched: bool = False) -> Workflow:
    """Returns the workflow with the hash of what came out."""
    return workflow.model_copy(update={"output": hash_output(output), "batched": batched})
