"""A call, before it runs, as a workflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.tasks import read_method
from bentoml_diffusers.workflow.files import Workflow
from bentoml_diffusers.workflow.record.values import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue

    from bentoml_diffusers.workflow.files import Generator


def complete_arguments(
    pipeline: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a call by name, defaults included.

    Raises:
        InvalidRequest: 400, an argument that the method does not take, or a state for a modular
            pipeline: it cannot be kept.
    """
    task = read_method(pipeline, method)
    if not task.is_modular:
        return task.with_defaults(task.bind(args, kwargs))
    state = args[0] if args else kwargs.get("state")
    if args or state is not None:
        raise InvalidRequest("state", state, "none, but all inputs by name: they are recorded")
    return task.with_defaults(kwargs)


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
