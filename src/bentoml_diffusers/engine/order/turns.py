"""Whose turn it is: how much of the device each caller has had."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.engine.order.work import Work

# A request is aged once so many times its share of the device has been given since it came.
PATIENCE = 8
# One of so many decisions is for the oldest aged request.
AGED_SHARE = 4


class Turns:
    """What each caller has been given, in pixel-steps by weight. Not safe from several threads.

    Start-time fair queuing (Goyal, Vin, Cheng 1996), the form of deficit round robin that needs no
    quantum: the caller with the least goes first. One that comes or comes back starts with the
    least of those that are there: the time in which it asked for nothing gives it no credit.
    """

    def __init__(self, given: Mapping[str, float] | None = None) -> None:
        self._given: dict[str, float] = dict(given or {})
        self._active: Counter[str] = Counter()
        self._since: dict[Work, float] = {}
        self._passed = 0
        self._clock = 0.0
        self._charged: dict[str, int] = {}
        self._charges = 0

    def enter(self, work: Work) -> None:
        """Notes that a request is there."""
        caller = work.caller
        if not self._active[caller]:
            floor = min((self._given[one] for one in +self._active), default=None)
            if floor is not None:
                self._forget(floor)
            self._given[caller] = max(floor or 0.0, self._given.get(caller, 0.0))
        self._active[caller] += 1
        self._since[work] = self._clock

    def leave(self, work: Work) -> None:
        """Notes that a request has ended."""
        self._active[work.caller] -= 1
        del self._since[work]
        if not self._active[work.caller]:
            del self._active[work.caller]
            if not self._active:
                self._given.clear()
            self._charged.pop(work.caller, None)

    def charge(self, work: Work, pixel_steps: float) -> None:
        """Notes what a request has been given."""
        self._given[work.caller] += pixel_steps / work.weight
        self._clock += pixel_steps
        self._charges += 1
        self._charged[work.caller] = self._charges

    def given(self, caller: str) -> float:
        """Returns what a caller has had."""
        return self._given[caller]

    def place(self, caller: str) -> tuple[float, int]:
        """Returns what orders callers: what each has had, and who was served last."""
        return self._given[caller], self._charged.get(caller, 0)

    def is_aged(self, work: Work) -> bool:
        """True if a request has waited so long that smaller ones give way."""
        fair = work.total * len(self._active) / work.weight
        return self._clock - self._since[work] > PATIENCE * fair

    @property
    def owes(self) -> bool:
        """True if it is the turn of the oldest aged request."""
        return self._passed >= AGED_SHARE - 1

    def note_aged(self, *, was_passed: bool) -> None:
        """Notes whether a decision passed over the oldest aged request."""
        self._passed = self._passed + 1 if was_passed else 0

    def all_given(self) -> dict[str, float]:
        """Returns what all callers have had."""
        return dict(self._given)

    def _forget(self, floor: float) -> None:
        """Drops what those that are gone have had, as far as it says nothing any more."""
        gone = [one for one in self._given if one not in self._active]
        for one in gone:
            if self._given[one] <= floor:
                del self._given[one]
