"""What a forward costs by the size of its batch, measured while serving; it caps each batch."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING

import torch

from bentoml_diffusers.engine.order import Costs

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


_FADING = 0.98  # of what is remembered of the overhead, for each forward


class CostProfile:
    """What each kind of forward costs, by batch size. Safe from any thread.

    A small model on a small image gains by every row that shares its forward; a large one on a
    large image gains nothing and only waits longer. Which it is depends on model, shape and
    machine, so it is measured, and each batch is as large as it gains: see :class:`Costs`.

    Args:
        max_rows: Largest batch, rows.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._kinds: dict[Hashable, Costs] = defaultdict(lambda: Costs(max_rows))
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Hashable, int]] = deque()
        self._lock = threading.Lock()
        self._busy_s = self._spent_s = 0.0
        self._ended: float | None = None

    def choose_rows(self, kind: Hashable, waiting: int, own: int = 0, stretch: float = 1.0) -> int:
        """Returns how many rows the next forward of this kind should have, at most ``waiting``.

        Args:
            kind: Of the forward.
            waiting: Rows that could share it.
            own: Rows among them of the caller whose turn it is; 0: all.
            stretch: How many times longer it may take than with these alone.
        """
        with self._lock:
            self._collect()
            return self._kinds[kind].choose_rows(waiting, own, stretch)

    def seconds(self, kind: Hashable, rows: int) -> float | None:
        """Returns how long a forward takes; ``None`` before it is known."""
        with self._lock:
            self._collect()
            return self._kinds[kind].seconds(rows) if kind in self._kinds else None

    def shrink(self, kind: Hashable, rows: int) -> None:
        """Notes that the device has too little memory for ``rows`` rows."""
        with self._lock:
            self._kinds[kind].max_rows = max(1, rows // 2)

    def start(self, device: torch.device, kind: Hashable, rows: int) -> Callable[[], None]:
        """Starts a measurement; the returned function ends it. Never waits for a GPU."""
        if device.type != "cuda":
            began = time.perf_counter()
            return lambda: self._record(kind, rows, time.perf_counter() - began)
        first, last = _new_event(), _new_event()
        first.record()

        def stop() -> None:
            last.record()
            with self._lock:
                self._pending.append((first, last, kind, rows))

        return stop

    def table(self) -> dict[Hashable, dict[int, float]]:
        """Returns the median seconds per row for each kind and size."""
        with self._lock:
            self._collect()
            kinds = [
                (name, [(size, list(times)) for size, times in kind.times.items() if times])
                for name, kind in self._kinds.items()
            ]
        return {
            name: {size: statistics.median(times) for size, times in sizes} for name, sizes in kinds
        }

    @property
    def overhead(self) -> float:
        """How much longer requests take than their forwards, lately; 1 on a GPU."""
        with self._lock:
            return self._spent_s / self._busy_s if self._busy_s else 1.0

    def rest(self) -> None:
        """Notes that no request runs now."""
        self._ended = None

    def _record(self, kind: Hashable, rows: int, seconds: float) -> None:
        now = time.perf_counter()
        with self._lock:
            self._kinds[kind].record(rows, seconds)
            if self._ended is not None:
                self._busy_s = _FADING * self._busy_s + seconds
                self._spent_s = _FADING * self._spent_s + now - self._ended
            self._ended = now

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            first, last, kind, rows = self._pending.popleft()
            self._kinds[kind].record(rows, first.elapsed_time(last) / 1000)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
