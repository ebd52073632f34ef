"""Records workflows of an engine's requests, and the outcome of replays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.host import describe_adapters
from bentoml_diffusers.engine.requests import Recording, Ticket
from bentoml_diffusers.workflow.record import Ran, capture, hash_output, record_call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.engine.host import EngineHost
    from bentoml_diffusers.engine.requests import Request, Result
    from bentoml_diffusers.tasks import RequestOptions
    from bentoml_diffusers.workflow.files import Workflow
    from bentoml_diffusers.workflow.record import Captured
    from bentoml_diffusers.workflow.replay import Plan


def make_recording(
    task: str, arguments: Mapping[str, Any], options: RequestOptions, plan: Plan | None
) -> Recording | None:
    """Returns what to record of a request, if anything.

    Args:
        task: Name of the task in the request.
        arguments: All arguments of the method.
        options: Its options.
        plan: The plan, if the request is a replay.
    """
    if plan is None and not options.return_workflow:
        return None
    scheduler = options.scheduler if isinstance(options.scheduler, (str, type)) else None
    if scheduler is None and plan is not None and plan.workflow.scheduler is not None:
        scheduler = plan.workflow.scheduler.requested  # so that a replay can be replayed itself
    return Recording(
        task=task,
        arguments=arguments,
        scheduler=scheduler,
        returns_workflow=bool(options.return_workflow),
        keep_size=bool(options.keep_size),
        plan=plan,
    )


class Recorder:
    """Records requests of one engine. Thread-safe.

    Args:
        host: The engine.
    """

    def __init__(self, host: EngineHost) -> None:
        self._host = host

    def begin(self, request: Request, ticket: Ticket) -> Captured | None:
        """Records a request before it runs; ``None`` if nothing is to be recorded.

        Raises:
            InvalidModel: 400, the files of the model are not what was stored.
            RequestCancelled: 503, the request was cancelled while it waited for that.
            DeadlineExceeded: 504, its time is over.
        """
        recording = request.recording
        if recording is None or not recording.returns_workflow:
            return None
        self._host.within(ticket).describe()  # fails before the request runs, if at all
        return capture(recording.arguments)

    def finish(self, request: Request, captured: Captured | None, result: Result) -> Result:
        """Returns the result with its workflow, and with the outcome of the replay."""
        recording = request.recording
        if recording is None:
            return result
        if captured is not None:
            workflow = self._make_workflow(request, recording, captured)
            output = hash_output(result.output)
            workflow = workflow.with_output(output, batched=result.was_batched)
            result = replace(result, workflow=workflow)
        plan = recording.plan
        if plan is not None:
            result = replace(result, replay=plan.report(result.output))
        return result

    def _make_workflow(
        self, request: Request, recording: Recording, captured: Captured
    ) -> Workflow:
        base = getattr(self._host.pipeline, "scheduler", None)
        choice = request.scheduler if base is not None else None
        ran = Ran(
            class_name=request.pipeline_class.__name__,
            method=request.method,
            scheduler=None if choice is None else choice.build(base),
            requested=recording.scheduler,
            guidance_scale=request.guidance_scale,
        )
        return record_call(
            self._host,
            ran,
            captured,
            task=recording.task,
            seeds=list(request.seeds),
            adapters=describe_adapters(request.adapters),
            exclusive=request.exclusive,
            keep_size=recording.keep_size,
        )
