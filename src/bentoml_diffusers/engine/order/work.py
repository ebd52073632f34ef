"""What the order of work needs to know of a request, and of its forwards that wait."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable

    from bentoml_diffusers.engine.order.paces import Pace

_numbers = itertools.count()


class Steps(Protocol):
    """Where a request stands: its ticket."""

    steps_done: int
    steps_total: int | None


@dataclass
class NoSteps:
    """Of work that is not a request's."""

    steps_done: int = 0
    steps_total: int | None = 0


@dataclass(eq=False)
class Work:
    """The work of one request.

    Attributes:
        caller: Whose it is.
        priority: From -8 to 8; each level doubles the share of its caller.
        pixels: Pixels times images: what one step of it costs.
        steps: How many steps it was asked to take.
        ticket: Counts them.
        deadline: Moment on the clock of the engine at which it must be done.
        pace: What those like it have cost, if there were any.
        is_urgent: It is late unless it goes first.
        urgent_from: Moment before which it is not.
        number: In the order in which requests came.
    """

    caller: str = ""
    priority: int = 0
    pixels: int = 1
    steps: int = 0
    ticket: Steps = field(default_factory=NoSteps)
    deadline: float | None = None
    pace: Pace | None = None
    is_urgent: bool = False
    urgent_from: float = 0.0
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def weight(self) -> float:
        """Share of its caller, relative to others."""
        return 2.0**self.priority

    @property
    def total(self) -> int:
        """All its work in pixel-steps, as far as that is known."""
        steps = self.ticket.steps_total
        return self.pixels * (self.steps if steps is None else steps)

    @property
    def remaining(self) -> int:
        """What is left of it, in pixel-steps."""
        return max(0, self.total - self.pixels * self.ticket.steps_done)


class Forward(Protocol):
    """A call of a shared module that waits to be run."""

    @property
    def work(self) -> Work:
        """Whose it is."""

    @property
    def key(self) -> Hashable:
        """Those of equal key can be joined."""

    @property
    def kind(self) -> Hashable:
        """Those of equal kind cost the same."""

    @property
    def rows(self) -> int:
        """Rows of a batch that it fills."""

    @property
    def is_step(self) -> bool:
        """It belongs to a denoising step, not to what comes before and after them."""

    @property
    def max_rows(self) -> int:
        """Largest batch of its module."""


class ChooseRows(Protocol):
    """The cost profile."""

    def __call__(self, kind: Hashable, waiting: int, own: int, stretch: float) -> int:
        """Returns how many rows the next forward of a kind may have.

        Args:
            kind: Of the forward.
            waiting: Rows that could share it.
            own: Rows among them of the caller whose turn it is.
            stretch: How many times longer it may take than with these alone.
        """
