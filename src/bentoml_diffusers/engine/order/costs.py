"""What a forward costs by the size of its batch, and how many rows are worth their time."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

ENOUGH = 3  # measurements of a size before it is judged
_KEPT = 9  # measurements kept of each size
_REVIEW = 300  # forwards after which other sizes are tried again
# So much of the throughput is given for the mean latency: one percent for four.
_LATENCY_SHARE = 0.25


class Costs:
    """Seconds per row of one kind of forward, for batch sizes rounded up to powers of two.

    Args:
        max_rows: Largest batch, rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._medians: dict[int, float] = {}
        self._forwards = 0

    def record(self, rows: int, seconds: float) -> None:
        """Notes a forward."""
        size = bucket(rows)
        self.times[size].append(seconds / rows)
        self._medians.pop(size, None)
        self._forwards += 1
        if self._forwards % _REVIEW == 0:
            self._review()

    def choose_rows(self, waiting: int, own: int, stretch: float) -> int:
        """Returns how many rows the next forward should have, at most ``waiting``.

        Args:
            waiting: Rows that could share it.
            own: Rows among them of the caller whose turn it is; 0: all.
            stretch: How many times longer it may take than with these alone.
        """
        rows = min(waiting, self.max_rows, self.choose(waiting))
        if 0 < own < rows:
            rows = min(rows, self.choose_within(own, stretch))
        return rows

    def choose(self, waiting: int) -> int:
        """Returns how many of the rows that wait should share a forward.

        With ``N`` rows that run in groups of ``b`` at a cost of ``c`` each, the mean latency is
        as ``c * (N + b)``, the time for all as ``c``. Sizes are tried from the largest down, three
        forwards each, until a smaller one is worse by a mean of both.
        """
        size = min(bucket(waiting), bucket(self.max_rows))
        while size > 1:
            smaller = size // 2
            here, there = self.per_row(size), self.per_row(smaller)
            if here is None:
                return size
            if there is None:
                return smaller
            lateness = (waiting + min(size, waiting)) / (waiting + smaller)
            if here * lateness**_LATENCY_SHARE < there:
                return size
            size = smaller
        return size

    def choose_within(self, own: int, stretch: float) -> int:
        """Returns how many rows take at most ``stretch`` times as long as ``own`` rows do.

        A size that was not measured is taken to cost as much per row as ``own`` rows.
        """
        base = self.per_row(bucket(own))
        allowed = int(own * stretch)
        if base is None:
            return allowed
        size = bucket(own)
        while size < self.max_rows:
            cost = self.per_row(2 * size)
            if cost is None or 2 * size * cost > stretch * own * base:
                break
            size *= 2
        return max(allowed, size)

    def per_row(self, size: int) -> float | None:
        """Returns the median seconds per row of a size; ``None`` before it is known."""
        if len(self.times[size]) < ENOUGH:
            return None
        if size not in self._medians:
            self._medians[size] = statistics.median(self.times[size])
        return self._medians[size]

    def seconds(self, rows: int) -> float | None:
        """Returns how long a forward takes; by the nearest smaller size if need be."""
        size = bucket(rows)
        while size:
            cost = self.per_row(size)
            if cost is not None:
                return rows * cost
            size //= 2
        return None

    def _review(self) -> None:
        for times in self.times.values():
            while len(times) >= ENOUGH:
                times.popleft()
        self._medians.clear()


def bucket(rows: int) -> int:
    """Returns the power of two from ``rows`` up."""
    return 1 << max(0, rows - 1).bit_length()
