"""From a workflow to a request that repeats it, after a look at what differs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.adapters import hash_adapter
from bentoml_diffusers.engine.request import Plan
from bentoml_diffusers.engine.schedulers import SchedulerChoice
from bentoml_diffusers.errors import AdapterNotFound, InvalidRequest
from bentoml_diffusers.tasks import OPTION_NAMES, OPTION_PLACES, is_modular
from bentoml_diffusers.workflow.files import LOCAL, Bounds
from bentoml_diffusers.workflow.record import Decoder, describe_guider, read_environment
from bentoml_diffusers.workflow.replay import (
    Difference,
    check_differences,
    check_limits,
    check_method,
    check_workflow,
    compare,
    find_scheduler,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bentoml_diffusers.adapters import AdapterBank
    from bentoml_diffusers.engine.recording import Recorder
    from bentoml_diffusers.engine.request import Ticket
    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Input, Task
    from bentoml_diffusers.tasks.finding import Finder
    from bentoml_diffusers.workflow.files import Adapter, Workflow

_PLAIN = (bool, int, float, str, list, tuple, type(None))
_FIELDS = {"lora": "lora_weights", "textual_inversion": "textual_inversions"}


class Planner:
    """Makes requests of workflows for one engine.

    Args:
        pipeline: The engine's.
        recorder: Knows what the engine has.
        bank: The engine's adapters.
        tasks: Those of the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        recorder: Recorder,
        bank: AdapterBank,
        tasks: Finder,
    ) -> None:
        self._pipeline = pipeline
        self._recorder = recorder
        self._bank = bank
        self._tasks = tasks

    def plan(
        self,
        workflow: Workflow,
        overrides: Mapping[str, Any],
        ticket: Ticket,
        *,
        strict: bool,
        limits: RequestLimits | None = None,
    ) -> Plan:
        """Returns the request that repeats a workflow; reads files of adapters the first time.

        Raises:
            WorkflowMismatch: 409, the engine has something else, and it is strict.
            InvalidWorkflow: 400, something in it cannot be.
            AdapterNotFound: 404, no such adapter, and it is strict.
            RequestCancelled: 503, the request was cancelled meanwhile.
            DeadlineExceeded: 504, its time is over.
        """
        check_workflow(workflow)
        if limits is not None:
            check_limits(workflow, limits, overrides)
        name, differences = self._find_task(workflow)
        task = self._tasks.find(name)
        environment = read_environment(self._recorder.device)
        differences += compare(workflow, self._recorder.describe(ticket), environment)
        differences += self._compare_guiders(workflow)
        given: dict[str, Any] = {
            "exclusive": True,
            "keep_size": workflow.keep_size,
            "seed": _join_seeds(workflow.seeds),
        }
        for field in _FIELDS.values():
            if field not in overrides:
                given[field] = self._find_adapters(workflow, field, differences, strict=strict)
        if task.is_guided and workflow.guider is not None:
            given["guidance_scale"] = workflow.guider.config.get("guidance_scale")
        given["scheduler"] = self._find_scheduler(workflow)
        bounds = LOCAL if limits is None else Bounds.of(limits)
        arguments = self._read_arguments(workflow, task, differences, bounds)
        if workflow.seeds or "seed" in overrides:
            arguments.pop("generator", None)
        told = check_differences(differences, strict=strict)
        return Plan(workflow, name, {**arguments, **given, **overrides}, told, _changes(overrides))

    def _read_arguments(
        self,
        workflow: Workflow,
        task: Task,
        differences: list[Difference],
        bounds: Bounds,
    ) -> dict[str, Any]:
        """Without what equals a default: checks look at what a caller gave."""
        decoder = Decoder(workflow.blobs, workflow.generators, self._recorder.device, bounds)
        arguments: dict[str, Any] = {}
        for name, value in decoder.decode_all(workflow.arguments).items():
            if not task.takes(name):
                field = f"workflow.arguments.{name}"
                differences.append(Difference(field, value, "no such argument", stops=True))
            elif not _is_default(value, task.inputs.get(name)):
                arguments[name] = value
        return arguments

    def _find_task(self, workflow: Workflow) -> tuple[str, list[Difference]]:
        recorded, own = workflow.pipeline, type(self._pipeline)
        if recorded.class_name == own.__name__ and is_modular(self._pipeline):
            return workflow.task or "__call__", []
        is_own = recorded.class_name == own.__name__
        if is_own:
            check_method(own, recorded.method)
        if is_own and recorded.method != "__call__":
            return recorded.method, []
        for task in (workflow.task, *_names.TASKS):
            if _class_of_task(self._pipeline, task) == recorded.class_name:
                return str(task), []
        if is_own:
            return recorded.method, []
        other = Difference(
            "workflow.pipeline.class_name", recorded.class_name, own.__name__, stops=True
        )
        is_task = workflow.task in _names.TASKS
        return str(workflow.task) if is_task else "__call__", [other]

    def _compare_guiders(self, workflow: Workflow) -> Iterator[Difference]:
        """All but the guidance scale, which a request can have of its own."""
        here = describe_guider(getattr(self._pipeline, "guider", None), guidance_scale=0)
        was = workflow.guider
        changed = {**was.config, "guidance_scale": 0} if was is not None else None
        if (was and was.class_name, changed) != (here and here.class_name, here and here.config):
            yield Difference("workflow.guider", was, here, stops=True)

    def _find_scheduler(self, workflow: Workflow) -> SchedulerChoice | None:
        base = getattr(self._pipeline, "scheduler", None)
        if base is None or workflow.scheduler is None:
            return None
        found = find_scheduler(workflow.scheduler, base)
        return None if found is None else SchedulerChoice(*found)

    def _find_adapters(
        self, workflow: Workflow, field: str, differences: list[Difference], *, strict: bool
    ) -> list[dict[str, Any]]:
        items = []
        for index, adapter in enumerate(workflow.adapters):
            if _FIELDS[adapter.kind] != field:
                continue
            place = f"workflow.adapters[{index}]"
            try:
                item, sha256 = self._find_adapter(adapter, field)
            except AdapterNotFound:
                if strict:
                    raise
                differences.append(Difference(place, adapter.name, None, stops=True))
                continue
            if sha256 != adapter.sha256:
                was, now = (f"{adapter.name} ({one})" for one in (adapter.sha256, sha256))
                differences.append(Difference(place, was, now, stops=True))
            items.append(item)
        return items

    def _find_adapter(self, recorded: Adapter, field: str) -> tuple[dict[str, Any], str]:
        """By its tag, else by its name: another store may have it in another version."""
        item: dict[str, Any] = {**recorded.arguments, "name": recorded.name}
        if recorded.kind == "lora":
            item["scale"] = recorded.scale
            item["components"] = list(recorded.components)
        if recorded.token is not None:
            item["token"] = recorded.token
        names = [name for name in (recorded.tag, recorded.name) if name]
        for name in names[:-1]:
            with contextlib.suppress(AdapterNotFound):
                return self._look_up({**item, "name": name}, field)
        return self._look_up({**item, "name": names[-1]}, field)

    def _look_up(self, item: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
        is_lora = field == _FIELDS["lora"]
        found = self._bank.find([item], None) if is_lora else self._bank.find(None, [item])
        for one in (*found.loras, *found.inversions):
            return item, hash_adapter(one)
        raise InvalidRequest(f"{field}.scale", 0, "another number")


def _class_of_task(pipeline: Any, task: str | None) -> str | None:
    if task not in _names.TASKS or is_modular(pipeline):
        return None
    try:
        return _names.task_class(type(pipeline), task).__name__
    except InvalidRequest:
        return None


def _is_default(value: object, item: Input | None) -> bool:
    if item is None or item.is_required or not isinstance(value, _PLAIN):
        return False
    return type(value) is type(item.default) and value == item.default


def _join_seeds(seeds: Sequence[int]) -> int | list[int] | None:
    """One seed where the others count up from it, so that overrides may ask for more pictures."""
    if not seeds:
        return None
    counted = [(seeds[0] + image) % 2**32 for image in range(len(seeds))]
    return seeds[0] if list(seeds) == counted else list(seeds)


def _changes(overrides: Mapping[str, Any]) -> bool:
    """True if one of them decides about the image."""
    return bool(set(overrides) - (OPTION_NAMES - set(OPTION_PLACES)))
