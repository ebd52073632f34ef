"""Plans the call that repeats a workflow, and finds what differs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import AdapterNotFound
from bentoml_diffusers.tasks import ADAPTER_OPTIONS, OPTION_NAMES, OPTION_PLACES
from bentoml_diffusers.workflow.files import LOCAL, Bounds
from bentoml_diffusers.workflow.record import (
    Decoder,
    describe_guider,
    hash_output,
    read_environment,
)
from bentoml_diffusers.workflow.replay.comparison import (
    Difference,
    ReplayReport,
    check_differences,
    compare,
)
from bentoml_diffusers.workflow.replay.components import check_workflow, find_scheduler
from bentoml_diffusers.workflow.replay.limits import check_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Adapter, Workflow
    from bentoml_diffusers.workflow.record import AdapterSource, Host


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A call that repeats a workflow.

    Attributes:
        workflow: The workflow that it repeats.
        name: Name of its task.
        task: Its task.
        arguments: The workflow's arguments that the task takes.
        adapters: Entries for the options of a request that name adapters.
        scheduler: Class and config; ``None`` for the pipeline's own.
        differences: What differs from the workflow, as text.
        is_changed: Overrides change the image.
    """

    workflow: Workflow
    name: str
    task: Task
    arguments: Mapping[str, Any]
    adapters: Mapping[str, list[dict[str, Any]]]
    scheduler: tuple[type[Any], dict[str, Any]] | None
    differences: tuple[str, ...]
    is_changed: bool

    def report(self, output: Any) -> ReplayReport:
        """Returns whether the output is the recorded one, and what differs."""
        recorded = self.workflow.output
        has_nothing = self.is_changed or recorded is None or not recorded.parts
        matches = None if has_nothing else hash_output(output) == recorded
        return ReplayReport(matches=matches, differences=self.differences)


def plan_replay(
    host: Host,
    workflow: Workflow,
    overrides: Mapping[str, Any],
    *,
    strict: bool,
    limits: RequestLimits | None = None,
) -> Plan:
    """Returns the call that repeats a workflow; reads the files of adapters once.

    Args:
        host: The host that will run it.
        workflow: The workflow to repeat.
        overrides: Arguments and options instead of those of the workflow.
        strict: ``False`` plans it in spite of differences, and only reports them.
        limits: Limits of a service, for an untrusted workflow.

    Raises:
        WorkflowMismatch: 409, the host differs, and it is strict.
        InvalidWorkflow: 400, something in it is invalid.
        AdapterNotFound: 404, no such adapter, and it is strict.
    """
    check_workflow(workflow)
    if limits is not None:
        check_limits(workflow, limits, overrides)
    name = host.name_task(workflow)
    task = host.find_task(name)
    differences = [*_compare_hosts(host, workflow, task)]
    options = [option for option in ADAPTER_OPTIONS.values() if option not in overrides]
    adapters = {}
    if host.adapters is not None:
        finder = _AdapterFinder(host.adapters, strict=strict)
        adapters = {option: finder.find(workflow, option) for option in options}
        differences += finder.differences
    differences += _compare_arguments(workflow, task)
    told = check_differences(differences, strict=strict)
    return Plan(
        workflow=workflow,
        name=name,
        task=task,
        arguments=_read_arguments(host, workflow, task, limits),
        adapters=adapters,
        scheduler=_find_scheduler(host, workflow),
        differences=told,
        is_changed=_changes(overrides),
    )


def _compare_hosts(host: Host, workflow: Workflow, task: Task) -> Iterator[Difference]:
    recorded, own = workflow.pipeline.class_name, type(host.pipeline).__name__
    if task.pipeline_class.__name__ != recorded:
        yield Difference("workflow.pipeline.class_name", recorded, own, stops=True)
    yield from compare(workflow, host.describe(), read_environment(host.device))
    if not host.rebuilds_guider:
        yield from _compare_guiders(host, workflow)
    if workflow.adapters and host.adapters is None:
        names = [one.name for one in workflow.adapters]
        yield Difference("workflow.adapters", names, "no engine to load them", stops=True)


def _compare_guiders(host: Host, workflow: Workflow) -> Iterator[Difference]:
    """Compares guiders except for the guidance scale, which a request can set."""
    here = describe_guider(getattr(host.pipeline, "guider", None), guidance_scale=0)
    was = workflow.guider
    changed = {**was.config, "guidance_scale": 0} if was is not None else None
    if (was and was.class_name, changed) != (here and here.class_name, here and here.config):
        yield Difference("workflow.guider", was, here, stops=True)


def _compare_arguments(workflow: Workflow, task: Task) -> Iterator[Difference]:
    for name, value in workflow.arguments.items():
        if not task.takes(name):
            field = f"workflow.arguments.{name}"
            yield Difference(field, value, "no such argument", stops=True)


def _read_arguments(
    host: Host, workflow: Workflow, task: Task, limits: RequestLimits | None
) -> dict[str, Any]:
    bounds = LOCAL if limits is None else Bounds.of(limits)
    decoder = Decoder(workflow.blobs, workflow.generators, host.device, bounds)
    decoded = decoder.decode_all(workflow.arguments)
    return {name: value for name, value in decoded.items() if task.takes(name)}


def _find_scheduler(host: Host, workflow: Workflow) -> tuple[type[Any], dict[str, Any]] | None:
    base = getattr(host.pipeline, "scheduler", None)
    if base is None or workflow.scheduler is None:
        return None
    return find_scheduler(workflow.scheduler, base)


def _changes(overrides: Mapping[str, Any]) -> bool:
    """True if one of them affects the image."""
    return bool(set(overrides) - (OPTION_NAMES - set(OPTION_PLACES)))


class _AdapterFinder:
    """Finds the adapters of a workflow, and what differs about them."""

    def __init__(self, source: AdapterSource, *, strict: bool) -> None:
        self._source = source
        self._strict = strict
        self.differences: list[Difference] = []

    def find(self, workflow: Workflow, option: str) -> list[dict[str, Any]]:
        """Returns the entries of one option.

        Raises:
            AdapterNotFound: 404, one is missing, and it is strict.
        """
        items = []
        for index, adapter in enumerate(workflow.adapters):
            if ADAPTER_OPTIONS[adapter.kind] != option:
                continue
            place = f"workflow.adapters[{index}]"
            try:
                item, sha256 = self._find_one(adapter, option)
            except AdapterNotFound:
                if self._strict:
                    raise
                self.differences.append(Difference(place, adapter.name, None, stops=True))
                continue
            if sha256 != adapter.sha256:
                was, now = (f"{adapter.name} ({one})" for one in (adapter.sha256, sha256))
                self.differences.append(Difference(place, was, now, stops=True))
            items.append(item)
        return items

    def _find_one(self, recorded: Adapter, option: str) -> tuple[dict[str, Any], str]:
        """Finds it by its tag, else by its name: another store may have another version."""
        item: dict[str, Any] = {**recorded.arguments, "name": recorded.name}
        if recorded.kind == "lora":
            item["scale"] = recorded.scale
            item["components"] = list(recorded.components)
        if recorded.token is not None:
            item["token"] = recorded.token
        *tags, last = [name for name in (recorded.tag, recorded.name) if name]
        for tag in tags:
            with contextlib.suppress(AdapterNotFound):
                tagged = {**item, "name": tag}
                return tagged, self._source.hash_adapter(option, tagged)
        named = {**item, "name": last}
        return named, self._source.hash_adapter(option, named)
