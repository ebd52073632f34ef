"""Who waits and who runs: the state of the queue, without its threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from bentoml_diffusers.engine.order.policy import choose_start, find_aged, kept_places
from bentoml_diffusers.engine.order.turns import Turns

if TYPE_CHECKING:
    from bentoml_diffusers.engine.order.work import Work

E = TypeVar("E")


class Queue(Generic[E]):
    """The requests of an engine, by their work. Not safe from several threads.

    Args:
        places: How many may run.
        max_waiting: How many may wait.
        max_pixel_steps: How much work may wait.
    """

    def __init__(self, places: int, max_waiting: int, max_pixel_steps: int) -> None:
        self._places = places
        self._max_waiting = max_waiting
        self._max_pixel_steps = max_pixel_steps
        self.waiting: dict[Work, E] = {}
        self.running: dict[Work, E] = {}
        self.turns = Turns()

    @property
    def has_place(self) -> bool:
        """True if another one may run."""
        return len(self.running) < self._places

    @property
    def work(self) -> int:
        """Pixel-steps that wait."""
        return sum(work.total for work in self.waiting)

    def has_room(self, new: Work) -> bool:
        """True if a request may wait.

        One of each caller may whatever its work is, and some room is kept for it.
        """
        if self.has_place and not self.waiting:
            return True
        if all(work.caller != new.caller for work in self.waiting):
            return len(self.waiting) < self._max_waiting
        room = self._max_waiting - kept_places(self._max_waiting)
        return len(self.waiting) < room and self.work + new.total <= self._max_pixel_steps

    def add(self, work: Work, entry: E) -> None:
        """Lets a request wait."""
        self.turns.enter(work)
        self.waiting[work] = entry

    def start_next(self) -> E | None:
        """Returns who starts now; ``None``: nobody."""
        work = choose_start(list(self.waiting), self.running, self._places, self.turns)
        if work is None:
            return None
        aged = find_aged(self.waiting, self.turns)
        if aged is not None:
            self.turns.note_aged(was_passed=aged is not work)
        self.turns.charge(work, work.total)
        entry = self.running[work] = self.waiting.pop(work)
        return entry

    def withdraw(self, work: Work) -> bool:
        """Takes out a request that waits; returns whether it does."""
        return self.waiting.pop(work, None) is not None

    def finish(self, work: Work) -> None:
        """Notes that a request was answered, which has been taken out or did run."""
        self.running.pop(work, None)
        self.turns.leave(work)
