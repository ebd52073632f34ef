"""Request-scoped views: a pipeline object of its own for each request, over shared weights."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.engine.request import Request, Ticket


def make_view(base: DiffusionPipeline, request: Request, ticket: Ticket) -> DiffusionPipeline:
    """Returns a pipeline for one request: shared modules, its own scheduler and state."""
    view = _as_class(base, request.pipeline_class)
    view.set_progress_bar_config(disable=True)
    scheduler = getattr(base, "scheduler", None)
    if scheduler is None:
        return view
    if request.scheduler_class is not None:
        view.scheduler = request.scheduler_class.from_config(scheduler.config)
    else:
        view.scheduler = copy.deepcopy(scheduler)
    _stop_between_steps(view.scheduler, ticket)
    return view


def _as_class(base: DiffusionPipeline, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    if cls is type(base):
        return copy.copy(base)
    # Not `cls.from_pipe`: it casts the shared weights to float32.
    known = inspect.signature(cls.__init__).parameters
    given = {**dict(base.config), **base.components}
    return cls(**{name: given[name] for name in known if name in given})


def _stop_between_steps(scheduler: Any, ticket: Ticket) -> None:
    name = "step" if hasattr(scheduler, "step") else "step_pred"  # the score SDEs call it so
    step = getattr(scheduler, name, None)
    if step is None:
        return

    @functools.wraps(step)
    def counted_step(*args: Any, **kwargs: Any) -> Any:
        ticket.check()
        ticket.steps_total = len(scheduler.timesteps)
        result = step(*args, **kwargs)
        ticket.steps_done += 1
        return result

    setattr(scheduler, name, counted_step)
