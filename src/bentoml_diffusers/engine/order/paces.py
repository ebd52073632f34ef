"""What requests have cost, by what they were: for the finish of those that are like them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    Seconds = Callable[[Hashable, int], float | None]

_KEPT = 256


@dataclass(frozen=True)
class Pace:
    """The forwards of a request.

    Attributes:
        kind: Kind of the forward of a step.
        rows: Its rows.
        per_step: How many of these a step takes.
        beside: What else a step calls, such as a ControlNet: kind, rows, how often.
        fixed: What is called whatever the steps are: text encoders, the decoder.
    """

    kind: Hashable
    rows: int
    per_step: float
    beside: tuple[tuple[Hashable, int, float], ...] = ()
    fixed: tuple[tuple[Hashable, int, float], ...] = ()

    @classmethod
    def of(cls, calls: Mapping[tuple[Hashable, int, bool], int], steps: int) -> Pace | None:
        """Returns the pace of a request that is done; ``None`` without steps.

        Args:
            calls: How often each kind was called with so many rows, and whether it is a step's.
            steps: How many it took.
        """
        denoising = {key: count for key, count in calls.items() if key[2]}
        if not denoising or steps < 1:
            return None
        main = max(denoising, key=denoising.__getitem__)
        others = [(kind, rows, count) for (kind, rows, _), count in calls.items()]
        others.remove((main[0], main[1], calls[main]))
        return cls(
            kind=main[0],
            rows=main[1],
            per_step=calls[main] / steps,
            beside=tuple((kind, rows, n / steps) for kind, rows, n in others if n >= steps > 1),
            fixed=tuple((kind, rows, n) for kind, rows, n in others if not n >= steps > 1),
        )

    def step_seconds(self, seconds: Seconds, rows: int | None = None) -> float | None:
        """Returns how long a step takes that is shared by so many rows; ``None``: unknown."""
        main = seconds(self.kind, rows or self.rows)
        beside = _sum(self.beside, seconds)
        return None if main is None or beside is None else main * self.per_step + beside

    def fixed_seconds(self, seconds: Seconds) -> float:
        """Returns how long takes what comes before and after the steps, as far as it is known."""
        return sum(count * (seconds(kind, rows) or 0.0) for kind, rows, count in self.fixed)


def _sum(calls: tuple[tuple[Hashable, int, float], ...], seconds: Seconds) -> float | None:
    total = 0.0
    for kind, rows, count in calls:
        cost = seconds(kind, rows)
        if cost is None:
            return None
        total += cost * count
    return total


class Paces:
    """The paces of the last requests, by what they were. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, Pace] = OrderedDict()

    def get(self, signature: Hashable) -> Pace | None:
        """Returns the pace of the last request of a signature; ``None`` if there was none."""
        with self._lock:
            return self._known.get(signature)

    def note(self, signature: Hashable, pace: Pace | None) -> None:
        """Keeps the pace of a request that is done."""
        if pace is None:
            return
        with self._lock:
            self._known[signature] = pace
            self._known.move_to_end(signature)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
