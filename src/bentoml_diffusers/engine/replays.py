"""From the plan of a replay to the arguments of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.requests import SchedulerChoice
from bentoml_diffusers.options import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bentoml_diffusers.tasks import Input
    from bentoml_diffusers.workflow.replay import Plan

_PLAIN = (bool, int, float, str, list, tuple, type(None))


def make_arguments(plan: Plan, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of the planned request, with its options.

    Without those that equal a default, since checks treat present arguments as the caller's.
    """
    workflow, inputs = plan.workflow, plan.task.inputs
    arguments = {
        name: value
        for name, value in plan.arguments.items()
        if not _is_default(value, inputs.get(name))
    }
    if workflow.seeds or "seed" in overrides:
        arguments.pop("generator", None)
    if plan.task.is_guided and workflow.guider is not None:
        arguments["guidance_scale"] = workflow.guider.config.get("guidance_scale")
    options = {
        "exclusive": True,
        "keep_size": workflow.keep_size,
        "seed": _join_seeds(workflow.seeds),
        "scheduler": None if plan.scheduler is None else SchedulerChoice(*plan.scheduler),
    }
    return {**arguments, **options, **plan.adapters, **overrides}


def _is_default(value: object, item: Input | None) -> bool:
    if item is None or item.is_required or not isinstance(value, _PLAIN):
        return False
    return type(value) is type(item.default) and value == item.default


def _join_seeds(seeds: Sequence[int]) -> int | list[int] | None:
    """Reduces consecutive seeds to the first, so that overrides may ask for more images."""
    if not seeds:
        return None
    counted = [(seeds[0] + image) % (MAX_SEED + 1) for image in range(len(seeds))]
    return seeds[0] if list(seeds) == counted else list(seeds)
