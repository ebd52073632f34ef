"""Workflows of plain diffusers pipelines: recorded and repeated without an engine."""

from __future__ import annotations

import copy
import logging
import secrets
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.errors import InvalidRequest, suggest
from bentoml_diffusers.tasks import read_method
from bentoml_diffusers.workflow.record import (
    Decoder,
    capture,
    complete_arguments,
    describe_guider,
    describe_pipeline,
    describe_scheduler,
    device_of,
    hash_output,
    read_environment,
)
from bentoml_diffusers.workflow.replay.canvas import fit_to_image
from bentoml_diffusers.workflow.replay.comparison import (
    Difference,
    ReplayReport,
    check_differences,
    compare,
)
from bentoml_diffusers.workflow.replay.components import (
    check_method,
    check_workflow,
    find_scheduler,
    rebuild_guider,
)
from bentoml_diffusers.workflow.replay.images import join_outputs, split_by_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Workflow

logger = logging.getLogger(__name__)


def run_with_workflow(
    pipeline: DiffusionPipeline, /, *args: Any, method: str = "__call__", **arguments: Any
) -> tuple[Any, Workflow]:
    """Calls a diffusers pipeline and records the call.

    Without a ``generator`` one of the CPU with a seed of 32 bits is made, so that the call can be
    repeated. The pipeline is not changed, nor is its class.

    Args:
        pipeline: Any pipeline: classic, custom, or made of blocks.
        *args: Arguments of the method.
        method: Which method to call.
        **arguments: Arguments of the method.

    Returns:
        What the pipeline returned, and the workflow.

    Raises:
        InvalidRequest: 400, a state for a modular pipeline, which takes its inputs by name here.
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
        arguments: Of the method, by name; a seed is drawn where they have no ``generator``.
        method: Which method would be called.
    """
    bound = _with_generator(complete_arguments(pipeline, method, (), arguments))
    return _capture(pipeline, method, bound)


def replay(
    pipeline: DiffusionPipeline, workflow: Workflow, /, *, strict: bool = True, **overrides: Any
) -> tuple[Any, ReplayReport]:
    """Repeats a workflow on a diffusers pipeline, which stays as it is.

    Args:
        pipeline: What the workflow was made with: same class, same weights, same adapters.
        workflow: Of :func:`run_with_workflow`, or of an engine without adapters of its own.
        strict: ``False`` runs it whatever differs, and only reports it.
        **overrides: Arguments to change, and ``seed``.

    Returns:
        What the pipeline returned, and what differs.

    Raises:
        WorkflowMismatch: 409, pipeline, weights, code or adapters differ, and it is strict.
        InvalidWorkflow: 400, something in it cannot be.
        InvalidRequest: 400, an override that the pipeline does not take.
    """
    check_workflow(workflow)
    method = workflow.pipeline.method
    check_method(type(pipeline), method)
    here = describe_pipeline(pipeline)
    task = read_method(pipeline, method)
    found = [
        *_compare_calls(workflow, here.class_name, task),
        *compare(workflow, here, read_environment(device_of(pipeline))),
    ]
    differences = check_differences(found, strict=strict)
    for text in differences:
        logger.warning("replay: %s", text)
    decoder = Decoder(workflow.blobs, workflow.generators, device_of(pipeline))
    arguments = _with_seeds(decoder.decode_all(workflow.arguments), workflow.seeds)
    arguments = {name: value for name, value in arguments.items() if task.takes(name)}
    arguments |= _check_overrides(overrides, arguments, task)
    canvas = None
    if workflow.keep_size:
        arguments, canvas = fit_to_image(pipeline, task, arguments)
    calls = _split_seeds(arguments) if workflow.seeds else [arguments]
    output = join_outputs(
        [getattr(_as_recorded(pipeline, workflow), method)(**call) for call in calls]
    )
    output = output if canvas is None else canvas.restore(output)
    return output, report(workflow, output, differences, is_changed=bool(overrides))


def report(
    workflow: Workflow, output: Any, differences: Sequence[str], *, is_changed: bool
) -> ReplayReport:
    """Returns whether the output is the recorded one, and what differs."""
    recorded = workflow.output
    has_nothing = is_changed or recorded is None or not recorded.parts
    matches = None if has_nothing else hash_output(output) == recorded
    return ReplayReport(matches=matches, differences=tuple(differences))


def make_generators(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """Returns one generator per seed; of the CPU, which gives the same noise on every device."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def _with_generator(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if "generator" not in arguments or arguments["generator"] is not None:
        return dict(arguments)
    return {**arguments, "generator": make_generators([secrets.randbits(32)])}


def _with_seeds(arguments: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    return {**arguments, "generator": make_generators(seeds)} if seeds else arguments


def _split_seeds(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As an engine does it, whose seeds are those of single images."""
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
    return capture(arguments).to_workflow(
        pipeline=describe_pipeline(pipeline).model_copy(update={"method": method}),
        scheduler=describe_scheduler(getattr(pipeline, "scheduler", None)),
        guider=describe_guider(getattr(pipeline, "guider", None)),
        environment=read_environment(device_of(pipeline)),
        exclusive=True,
    )


def _as_recorded(pipeline: Any, workflow: Workflow) -> Any:
    """Returns a copy of the pipeline over the same components, with scheduler and guider its own.

    Not by `setattr`: that also rewrites the pipeline's config.
    """
    view = copy.copy(pipeline)
    scheduler, guider = getattr(pipeline, "scheduler", None), getattr(pipeline, "guider", None)
    if scheduler is not None and workflow.scheduler is not None:
        found = find_scheduler(workflow.scheduler, scheduler)
        cls, config = found or (type(scheduler), scheduler.config)
        view.__dict__["scheduler"] = cls.from_config(config)
    if guider is not None and workflow.guider is not None:
        view.__dict__["guider"] = rebuild_guider(workflow.guider, guider)
    return view


def _compare_calls(workflow: Workflow, class_name: str, task: Task) -> Iterator[Difference]:
    if workflow.pipeline.class_name != class_name:
        recorded = workflow.pipeline.class_name
        yield Difference("workflow.pipeline.class_name", recorded, class_name, stops=True)
    if workflow.adapters:
        names = [one.name for one in workflow.adapters]
        yield Difference("workflow.adapters", names, "no engine that has them", stops=True)
    for name in workflow.arguments:
        if not task.takes(name):
            yield Difference(f"workflow.arguments.{name}", "an argument", "none", stops=True)


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
