"""Records and replays calls of plain diffusers pipelines, without an engine."""

from __future__ import annotations

import copy
import logging
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bentoml_diffusers.errors import InvalidRequest, suggest
from bentoml_diffusers.tasks import read_method
from bentoml_diffusers.workflow.record import (
    Ran,
    capture,
    complete_arguments,
    describe_pipeline,
    device_of,
    hash_output,
    record_call,
)
from bentoml_diffusers.workflow.replay.canvas import fit_to_image
from bentoml_diffusers.workflow.replay.components import check_method, rebuild_guider
from bentoml_diffusers.workflow.replay.images import join_outputs, split_by_image
from bentoml_diffusers.workflow.replay.plan import plan_replay

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Pipeline, Workflow
    from bentoml_diffusers.workflow.replay.comparison import ReplayReport
    from bentoml_diffusers.workflow.replay.plan import Plan

logger = logging.getLogger(__name__)


def run_with_workflow(
    pipeline: DiffusionPipeline, /, *args: Any, method: str = "__call__", **arguments: Any
) -> tuple[Any, Workflow]:
    """Calls a diffusers pipeline and records the call.

    Without a ``generator`` a CPU generator with a seed of 32 bits is created, so that the call can
    be repeated. Neither the pipeline nor its class is changed.

    Args:
        pipeline: Any pipeline: classic, custom, or made of blocks.
        *args: Arguments of the method.
        method: Which method to call.
        **arguments: Arguments of the method.

    Returns:
        What the pipeline returned, and the workflow.

    Raises:
        InvalidRequest: 400, a state for a modular pipeline: here it takes its inputs by name.
    """
    bound = _with_generator(complete_arguments(pipeline, method, args, arguments))
    workflow = _capture(pipeline, method, bound)
    output = getattr(pipeline, method)(**bound)
    return output, workflow.with_output(hash_output(output))


def populate_workflow_from_pipeline(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Any], *, method: str = "__call__"
) -> Workflow:
    """Returns the workflow of a call without running it, so without a hash of the output.

    Args:
        pipeline: Any pipeline.
        arguments: Arguments of the method; a seed is drawn if they have no ``generator``.
        method: Which method would be called.
    """
    bound = _with_generator(complete_arguments(pipeline, method, (), arguments))
    return _capture(pipeline, method, bound)


def replay(
    pipeline: DiffusionPipeline, workflow: Workflow, /, *, strict: bool = True, **overrides: Any
) -> tuple[Any, ReplayReport]:
    """Repeats a workflow on a diffusers pipeline, which stays unchanged.

    Args:
        pipeline: A pipeline of the same class, with the same weights and adapters.
        workflow: From :func:`run_with_workflow`, or from an engine without adapters in requests.
        strict: ``False`` runs it in spite of differences, and only reports them.
        **overrides: Arguments to change, and ``seed``.

    Returns:
        What the pipeline returned, and what differs.

    Raises:
        WorkflowMismatch: 409, pipeline, weights, code or adapters differ, and it is strict.
        InvalidWorkflow: 400, something in it is invalid.
        InvalidRequest: 400, an override that the pipeline does not take.
    """
    plan = plan_replay(PlainHost(pipeline), workflow, overrides, strict=strict)
    for text in plan.differences:
        logger.warning("replay: %s", text)
    arguments = _with_seeds(plan.arguments, workflow.seeds)
    arguments |= _check_overrides(overrides, arguments, plan.task)
    canvas = None
    if workflow.keep_size:
        arguments, canvas = fit_to_image(pipeline, plan.task, arguments)
    calls = _split_seeds(arguments) if workflow.seeds else [arguments]
    output = join_outputs(
        [getattr(_as_recorded(pipeline, plan), plan.task.method)(**call) for call in calls]
    )
    output = output if canvas is None else canvas.restore(output)
    return output, plan.report(output)


@dataclass(frozen=True)
class PlainHost:
    """A plain pipeline, with only the adapters that are loaded into it."""

    pipeline: Any
    adapters: ClassVar[None] = None
    rebuilds_guider: ClassVar[bool] = True

    @property
    def device(self) -> str:
        """Type of the device that the pipeline computes on."""
        return device_of(self.pipeline)

    def describe(self) -> Pipeline:
        """Describes the pipeline in its current state."""
        return describe_pipeline(self.pipeline)

    def name_task(self, workflow: Workflow) -> str:
        """Returns the name of the method that a workflow records."""
        check_method(type(self.pipeline), workflow.pipeline.method)
        return workflow.pipeline.method

    def find_task(self, name: str) -> Task:
        """Returns the task of a method."""
        task = read_method(self.pipeline, name)
        return replace(task, pipeline_class=type(self.pipeline))


def make_generators(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """Returns a CPU generator for each seed, for the same noise on every device."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def _with_generator(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if "generator" not in arguments or arguments["generator"] is not None:
        return dict(arguments)
    return {**arguments, "generator": make_generators([secrets.randbits(32)])}


def _with_seeds(arguments: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    return {**arguments, **({"generator": make_generators(seeds)} if seeds else {})}


def _split_seeds(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Splits seeds as an engine does, which has one for each image."""
    others = {name: value for name, value in arguments.items() if name != "generator"}
    generators = arguments.get("generator")
    generators = generators if isinstance(generators, list) else [generators]
    calls = split_by_image(others, len(generators))
    if len(calls) == 1:
        return [dict(arguments)]
    return [
        {**call, "generator": generator} for call, generator in zip(calls, generators, strict=True)
    ]


def _capture(pipeline: Any, method: str, arguments: Mapping[str, Any]) -> Workflow:
    ran = Ran(class_name=type(pipeline).__name__, method=method)
    return record_call(PlainHost(pipeline), ran, capture(arguments), exclusive=True)


def _as_recorded(pipeline: Any, plan: Plan) -> Any:
    """Returns a copy of the pipeline over the same components, with its own scheduler and guider.

    Not by `setattr`, which would also rewrite the pipeline's config.
    """
    view, workflow = copy.copy(pipeline), plan.workflow
    scheduler, guider = getattr(pipeline, "scheduler", None), getattr(pipeline, "guider", None)
    if scheduler is not None and workflow.scheduler is not None:
        cls, config = plan.scheduler or (type(scheduler), scheduler.config)
        view.__dict__["scheduler"] = cls.from_config(config)
    if guider is not None and workflow.guider is not None:
        view.__dict__["guider"] = rebuild_guider(workflow.guider, guider)
    return view


def _check_overrides(
    overrides: Mapping[str, Any], arguments: Mapping[str, Any], task: Task
) -> dict[str, Any]:
    names = {*arguments, *task.inputs, "seed"}
    for name, value in overrides.items():
        if name not in names:
            expected = f"an argument of the pipeline{suggest(name, names)}"
            raise InvalidRequest(name, value, expected)
    changed = dict(overrides)
    seed = changed.pop("seed", None)
    return changed if seed is None else {**changed, "generator": make_generators([seed])}
