"""Records a call, before it runs, as a workflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.tasks import read_method
from bentoml_diffusers.workflow.files import Workflow
from bentoml_diffusers.workflow.record.description import describe_guider, describe_scheduler
from bentoml_diffusers.workflow.record.environment import read_environment
from bentoml_diffusers.workflow.record.values import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue

    from bentoml_diffusers.workflow.files import Generator
    from bentoml_diffusers.workflow.record.host import Host


def complete_arguments(
    pipeline: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a call by name, defaults included.

    Raises:
        InvalidRequest: 400, an argument that the method does not take, or a state for a modular
            pipeline, which cannot be recorded.
    """
    task = read_method(pipeline, method)
    if not task.is_modular:
        return task.with_defaults(task.bind(args, kwargs))
    state = args[0] if args else kwargs.get("state")
    if args or state is not None:
        raise InvalidRequest(
            "state", state, "no state, but all inputs by name, so that they can be recorded"
        )
    return task.with_defaults(kwargs)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a host ran, and what replaced the pipeline's own scheduler and guider.

    Attributes:
        class_name: Class of the pipeline that ran: the host's, or one of its family.
        method: The method.
        scheduler: Used instead of the pipeline's.
        requested: The scheduler in the request: a name, or a class.
        guidance_scale: Used instead of the guider's.
    """

    class_name: str
    method: str
    scheduler: Any = None
    requested: object = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Captured:
    """The arguments of a call, recorded before it runs, since a pipeline may change them."""

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
    """Records all arguments of a call that is about to run."""
    encoder = Encoder()
    kept, unsupported = encoder.encode_all(arguments)
    return Captured(kept, unsupported, encoder.generators, encoder.blobs)


def record_call(host: Host, ran: Ran, captured: Captured, **fields: Any) -> Workflow:
    """Returns the workflow of a call, without its output.

    Args:
        host: The host that runs it.
        ran: What the host runs.
        captured: The arguments.
        **fields: More fields of the workflow.
    """
    scheduler = ran.scheduler
    if scheduler is None:
        scheduler = getattr(host.pipeline, "scheduler", None)
    guider = getattr(host.pipeline, "guider", None)
    called = {"class_name": ran.class_name, "method": ran.method}
    return captured.to_workflow(
        pipeline=host.describe().model_copy(update=called),
        scheduler=describe_scheduler(scheduler, ran.requested),
        guider=describe_guider(guider, guidance_scale=ran.guidance_scale),
        environment=read_environment(host.device),
        **fields,
    )
