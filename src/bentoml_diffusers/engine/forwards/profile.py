"""What a forward costs by the size of its batch, measured while serving; it caps each batch."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

# A smaller batch is taken if a larger one is not faster per row by at least this share.
_GAIN = 0.03
_ENOUGH = 3  # measurements of a size before it is judged
_KEPT = 9  # measurements kept of each size
_REVIEW = 300  # forwards after which other sizes are tried again


class CostProfile:
    """Seconds per row of each kind of forward, for batch sizes rounded up to powers of two.

    A small model on a small image gains by every row that shares its forward; a large one on a
    large image gains nothing and only waits longer. Which it is depends on model, shape and
    machine, so it is measured. Sizes are tried from the largest down, three forwards each, until
    a smaller one is slower per row. Safe from any thread.

    Args:
        max_rows: Largest batch, rows.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._kinds: dict[Hashable, _Kind] = defaultdict(lambda: _Kind(max_rows))
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Hashable, int]] = deque()
        self._lock = threading.Lock()

    def choose_rows(self, kind: Hashable, waiting: int) -> int:
        """Returns how many rows the next forward of this kind should have, at most ``waiting``."""
        with self._lock:
            self._collect()
            return min(waiting, self._kinds[kind].max_rows, self._kinds[kind].choose(waiting))

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

    def _record(self, kind: Hashable, rows: int, seconds: float) -> None:
        with self._lock:
            self._kinds[kind].record(rows, seconds)

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            first, last, kind, rows = self._pending.popleft()
            self._kinds[kind].record(rows, first.elapsed_time(last) / 1000)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Kind:
    """Measurements of one module at one shape."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._forwards = 0

    def record(self, rows: int, seconds: float) -> None:
        self.times[bucket(rows)].append(seconds / rows)
        self._forwards += 1
        if self._forwards % _REVIEW == 0:
            for times in self.times.values():
                while len(times) >= _ENOUGH:
                    times.popleft()

    def choose(self, waiting: int) -> int:
        size = min(bucket(waiting), bucket(self.max_rows))
        while size > 1:
            if len(self.times[size]) < _ENOUGH:
                return size
            smaller = size // 2
            if len(self.times[smaller]) < _ENOUGH:
                return smaller
            here, there = (statistics.median(self.times[one]) for one in (size, smaller))
            if here < there * (1 - _GAIN):
                return size
            size = smaller
        return size


def bucket(rows: int) -> int:
    """Returns the power of two from ``rows`` up."""
    return 1 << max(0, rows - 1).bit_length()
