"""A call, before it runs, as a workflow."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.workflow.describing import is_modular
from bentoml_diffusers.workflow.schema import Workflow
from bentoml_diffusers.workflow.values import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue

    from bentoml_diffusers.workflow.schema import Generator


def complete_arguments(
    pipeline: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a call by name, defaults included.

    Raises:
        TypeError: The method does not take them.
        InvalidRequest: 400, a state for a modular pipeline: it cannot be kept.
    """
    if is_modular(pipeline) and method == "__call__":
        state = args[0] if args else kwargs.get("state")
        if args or state is not None:
            raise InvalidRequest("state", state, "none, but all inputs by name: they are recorded")
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


@dataclass(frozen=True)
class Captured:
    """The arguments of a call, read before it ran: a pipeline may change them."""

    kept: dict[str, JsonValue]
    unsupported: dict[str, str]
    generators: list[Generator]
    blobs: dict[str, bytes]

    def to_workflow(self, **fields: Any) -> Workflow:
        """Returns the workflow.

        Args:
            **fields: All its other fields.
        """
        workflow = Workflow(
            arguments=self.kept,
            unsupported=self.unsupported,
            generators=self.generators,
            **fields,
        )
        return workflow.with_blobs(self.blobs)


def capture(arguments: Mapping[str, Any]) -> Captured:
    """Reads all arguments of a call that is about to run."""
    encoder = Encoder()
    kept, unsupported = encoder.encode_all(arguments)
    return Captured(kept, unsupported, encoder.generators, encoder.blobs)
