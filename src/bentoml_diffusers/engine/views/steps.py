"""Counts the steps of a request's schedulers, and stops it between two of them."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.views.preview import generate_preview

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from bentoml_diffusers.engine.requests import Request, Ticket


def count_steps(scheduler: Any, view: DiffusionPipeline, request: Request, ticket: Ticket) -> None:
    """Makes a scheduler check the ticket before each step, and count the step after it.

    This changes its class, so copies of the scheduler work, too, such as those of LTX-2. Copies
    stop with the request, but only the original counts.

    Args:
        scheduler: The request's own.
        view: The pipeline that steps it, for previews; the first one if there are several.
        request: The request.
        ticket: The request's ticket.
    """
    # Schedulers of score SDEs call it `step_pred`.
    name = "step" if hasattr(scheduler, "step") else "step_pred"
    cls: Any = type(scheduler)
    if hasattr(cls, name) and _COUNTER not in vars(scheduler):
        scheduler.__class__ = _counting_class(cls, name)
        scheduler.__dict__[_COUNTER] = _Counter(scheduler, view, request, ticket)


_COUNTER = "_bentoml_diffusers_counter"


@functools.lru_cache(maxsize=256)
def _counting_class(cls: Any, name: str) -> type[Any]:
    """Returns a subclass of the same name whose steps are counted."""
    step = getattr(cls, name)

    @functools.wraps(step)
    def counted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter: _Counter = self.__dict__[_COUNTER]
        counter.ticket.check()
        result = step(self, *args, **kwargs)
        counter.count(self, result)
        return result

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {name: counted_step, **names})


class _Counter:
    """Belongs to one scheduler of one request."""

    def __init__(
        self, scheduler: Any, view: DiffusionPipeline, request: Request, ticket: Ticket
    ) -> None:
        self.ticket = ticket
        self._scheduler = scheduler
        self._view = view
        self._request = request
        self._timesteps: Any = None
        self._done_before = 0
        self._last_preview = -math.inf

    def __deepcopy__(self, memo: object) -> _Counter:
        return self

    def count(self, scheduler: Any, result: Any) -> None:
        """Counts a step, unless a copy of the scheduler did it."""
        if scheduler is not self._scheduler:
            return
        if scheduler.timesteps is not self._timesteps:  # one of several loops, such as a prior's
            self._timesteps = scheduler.timesteps
            self._done_before = self.ticket.steps_done
        total = self._done_before + len(scheduler.timesteps)
        preview = self._make_preview(result, self.ticket.steps_done + 1, total)
        self.ticket.count_step(total, preview)

    def _make_preview(self, result: Any, done: int, total: int) -> Image.Image | None:
        request, now = self._request, time.monotonic()
        if not request.previews.is_due(done, total, now - self._last_preview):
            return None
        preview = generate_preview(
            self._view, result, request.arguments, is_full=request.previews.is_full
        )
        self._last_preview = time.monotonic()
        if preview is not None and request.canvas is not None:
            preview = request.canvas.restore_image(preview)
        return preview
