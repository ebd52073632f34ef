"""Checks the steps that a request asks for against the scheduler that will take them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin

_SCHEDULES = ("timesteps", "sigmas")
_RUNGE_KUTTA_STEPS = 4  # that PNDM begins with


def check_steps(
    cls: type[Any],
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any],
    scheduler: SchedulerMixin | None,
) -> None:
    """Checks steps, strength and schedules of a call.

    Args:
        cls: Class of the pipeline.
        defaults: Defaults of its method.
        arguments: Arguments of the call.
        scheduler: One like that of the request; not changed.

    Raises:
        InvalidRequest: 400, the scheduler cannot run these steps, or none is left.
    """
    steps = arguments.get("num_inference_steps")
    least, most = _least_steps(scheduler), _most_steps(scheduler)
    if steps is not None and not least <= steps <= (most or steps):
        name = type(scheduler).__name__
        expected = f"at least {least} with {name}" if steps < least else f"from {least} to {most}"
        raise InvalidRequest("num_inference_steps", steps, expected)
    for name in _SCHEDULES:
        if arguments.get(name) is not None:
            _check_schedule(name, arguments[name], scheduler)
    _check_strength(cls, defaults, arguments, scheduler)


def _most_steps(scheduler: SchedulerMixin | None) -> int | None:
    """The largest number of steps; unlimited for flow matching, whatever the training had."""
    config = getattr(scheduler, "config", None)
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    if is_flow or getattr(config, "use_flow_sigmas", False):
        return None
    return getattr(config, "num_train_timesteps", None)


def _least_steps(scheduler: SchedulerMixin | None) -> int:
    """The smallest number of steps; fewer fail inside of diffusers (0.42)."""
    begins_slowly = not getattr(getattr(scheduler, "config", None), "skip_prk_steps", True)
    is_pndm = type(scheduler).__name__ == "PNDMScheduler"
    return _RUNGE_KUTTA_STEPS if is_pndm and begins_slowly else 1


def _check_schedule(name: str, value: Any, scheduler: SchedulerMixin | None) -> None:
    setter = getattr(scheduler, "set_timesteps", None)
    if setter is not None and name not in inspect.signature(setter).parameters:
        raise InvalidRequest(name, value, f"None: {type(scheduler).__name__} chooses its own")


def _check_strength(
    cls: type[Any],
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any],
    scheduler: SchedulerMixin | None,
) -> None:
    strength = arguments.get("strength")
    if strength is None and arguments.get("image") is not None:
        strength = defaults.get("strength")
    if not isinstance(strength, (int, float)) or arguments.get("denoising_start") is not None:
        return
    if not 0 < strength <= 1:
        raise InvalidRequest("strength", strength, "above 0, up to 1")
    steps = arguments.get("num_inference_steps")
    if steps is None:
        steps = defaults.get("num_inference_steps")
    if not isinstance(steps, int) or int(steps * strength) >= 1:
        return
    if _count_steps_left(cls, steps, strength, scheduler) < 1:
        raise InvalidRequest(
            "strength", strength, f"at least {1 / steps:.3g} with {steps} num_inference_steps"
        )


def _count_steps_left(
    cls: type[Any], steps: int, strength: float, scheduler: SchedulerMixin | None
) -> int:
    """Counts as the pipeline does: PNDM has more timesteps than steps, flow matching rounds up."""
    if scheduler is None or not hasattr(cls, "get_timesteps"):
        return 0
    own = type(scheduler).from_config(scheduler.config)
    shifts = getattr(scheduler.config, "use_dynamic_shifting", False)
    own.set_timesteps(steps, **({"mu": 1.0} if shifts else {}))
    try:
        left = cls.get_timesteps(SimpleNamespace(scheduler=own), steps, strength, "cpu")[0]
    except (AttributeError, TypeError):  # a pipeline with its own way of counting
        return 0
    return len(left)
