"""Compares a workflow with the pipeline that is to repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import WorkflowMismatch, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bentoml_diffusers.workflow.files import (
        Adapter,
        Attached,
        Environment,
        Pipeline,
        StoredModel,
        Workflow,
    )


@dataclass(frozen=True)
class Difference:
    """Something that differs from the workflow.

    Attributes:
        field: Field of the workflow.
        recorded: The recorded value.
        here: The current value.
        stops: It makes a replay pointless; otherwise only the last bits may differ.
    """

    field: str
    recorded: object
    here: object
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.field} was {_word(self.recorded)}, here it is {_word(self.here)}"


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """The outcome of a replay.

    Attributes:
        matches: The output is the same to the last bit; ``None`` if there is nothing to compare
            with: the replay was changed, or the workflow has no hash.
        differences: What differs from the recorded call, as text.
    """

    matches: bool | None
    differences: tuple[str, ...] = ()


def check_differences(found: Iterable[Difference], *, strict: bool) -> tuple[str, ...]:
    """Returns the differences as text.

    Raises:
        WorkflowMismatch: 409, one of them makes the replay pointless, and it is strict.
    """
    all_of_them = list(found)
    stopping = [one for one in all_of_them if one.stops]
    if strict and stopping:
        raise WorkflowMismatch(stopping[0].field, [str(one) for one in stopping])
    return tuple(str(one) for one in all_of_them)


def compare(workflow: Workflow, here: Pipeline, environment: Environment) -> Iterator[Difference]:
    """Yields the differences, except class and method, which the caller compares."""
    recorded = workflow.pipeline
    yield from _compare_models(recorded, here)
    for name in ("code_sha256", "blocks"):
        were, are = getattr(recorded, name), getattr(here, name)
        yield from _compare_one(f"pipeline.{name}", were, are, stops=True)
    attached = [_name_attached(one) for one in recorded.attached if one.is_active]
    attached_here = [_name_attached(one) for one in here.attached if one.is_active]
    yield from _compare_one(
        "pipeline.attached", sorted(attached), sorted(attached_here), stops=True
    )
    yield from _compare_components(recorded, here)
    for name in ("config", "options"):
        yield from _compare_all(f"pipeline.{name}", getattr(recorded, name), getattr(here, name))
    yield from _compare_environments(workflow, environment)
    if workflow.batched:
        yield Difference("workflow.batched", "shared with other requests", "alone")
    for name, what in workflow.unsupported.items():
        yield Difference(
            f"workflow.arguments.{name}", f"{what}, which was not recorded", "left out"
        )


def _compare_environments(workflow: Workflow, here: Environment) -> Iterator[Difference]:
    device = here.hardware.get("device")
    for index, generator in enumerate(workflow.generators):
        if generator.device not in ("cpu", device):
            field = f"workflow.generators[{index}].device"
            yield Difference(field, generator.device, device, stops=True)
    for name in ("versions", "hardware", "numerics"):
        were, are = getattr(workflow.environment, name), getattr(here, name)
        yield from _compare_all(f"environment.{name}", were, are)


def _compare_models(recorded: Pipeline, here: Pipeline) -> Iterator[Difference]:
    """Compares the hashes over all files if both have them, else the weights in memory."""
    was, now = recorded.model, here.model
    if was and now and was.tree_sha256 and now.tree_sha256:
        if was.tree_sha256 != now.tree_sha256:
            yield Difference("workflow.pipeline.model", _name_model(was), _name_model(now), True)
        static = sorted(map(_name_adapter, recorded.static_adapters))
        static_here = sorted(map(_name_adapter, here.static_adapters))
        yield from _compare_one("pipeline.static_adapters", static, static_here, stops=True)
    elif recorded.weights_sha256 and here.weights_sha256:
        hashes = (recorded.weights_sha256, here.weights_sha256)
        yield from _compare_one("pipeline.weights_sha256", *hashes, stops=True)
    else:
        yield Difference("workflow.pipeline.model", "not recorded", "not to be compared")


def _compare_components(recorded: Pipeline, here: Pipeline) -> Iterator[Difference]:
    for name in sorted({*recorded.components, *here.components}):
        was, now = recorded.components.get(name), here.components.get(name)
        if was is None or now is None:
            yield Difference(f"workflow.pipeline.components.{name}", _kind(was), _kind(now))
            continue
        field = f"pipeline.components.{name}"
        yield from _compare_all(field, was.model_dump(), now.model_dump())


def _compare_all(
    field: str, recorded: Mapping[str, Any], here: Mapping[str, Any]
) -> Iterator[Difference]:
    for name in sorted({*recorded, *here}):
        yield from _compare_one(f"{field}.{name}", recorded.get(name), here.get(name))


def _compare_one(
    field: str, recorded: object, here: object, *, stops: bool = False
) -> Iterator[Difference]:
    if recorded != here:
        yield Difference(f"workflow.{field}", recorded, here, stops)


def _name_model(model: StoredModel) -> str:
    return f"{model.tag or model.origin} ({model.tree_sha256})"


def _name_adapter(one: Adapter) -> str:
    fused = ", fused" if one.is_fused else ""
    on = f" on {', '.join(one.components)}" if one.components else ""
    return f"{one.kind} {one.token or one.name} at {one.scale}{on}{fused} ({one.sha256})"


def _name_attached(one: Attached) -> str:
    name = f" {one.name}" if one.kind == "textual_inversion" else ""
    return f"{one.kind}{name} on {one.component} at {one.scale} ({one.sha256})"


def _kind(part: Any) -> str | None:
    return None if part is None else part.class_name


def _word(value: object) -> str:
    return "none" if value is None or value == [] else shorten(value, 300)
