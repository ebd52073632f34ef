"""How much a key may ask for: in a minute, and at once. Safe from any thread.

Each worker of a service counts for itself.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from bentoml_diffusers.serving.refusals import QuotaExceeded, QuotaTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable

_MINUTE_S = 60.0


class Bucket:
    """What may be taken in a minute; it fills again as time goes, up to a minute's worth.

    Args:
        name: Of the limit, for the error.
        per_minute: How much; ``None``: as much as one likes.
        clock: Returns seconds.
    """

    def __init__(
        self, name: str, per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute or 0)
        self._since = clock()
        self._lock = threading.Lock()

    def take(self, amount: int) -> None:
        """Takes an amount.

        Raises:
            QuotaExceeded: 429, says when there is enough.
            QuotaTooSmall: 403, there never is.
        """
        if self._per_minute is None:
            return
        if amount > self._per_minute:
            raise QuotaTooSmall(self._name, self._per_minute, amount)
        with self._lock:
            self._fill()
            missing = amount - self._level
            if missing > 0:
                wait_s = math.ceil(missing * _MINUTE_S / self._per_minute)
                raise QuotaExceeded(self._name, self._per_minute, wait_s)
            self._level -= amount

    def give_back(self, amount: int) -> None:
        """For what was taken and not used."""
        if self._per_minute is not None:
            with self._lock:
                self._level = min(self._level + amount, float(self._per_minute))

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._since) * (self._per_minute or 0) / _MINUTE_S
        self._level = min(self._level + gained, float(self._per_minute or 0))
        self._since = now


class Places:
    """How many requests may be there at once.

    Args:
        size: How many; ``None``: any number.
        clock: Returns seconds.
    """

    def __init__(self, size: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock = clock
        self._began: list[float] = []
        self._usual_s = 1.0  # how long a request takes, by a moving average
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How many are there now."""
        return len(self._began)

    def take(self) -> float:
        """Takes a place; returns what :meth:`leave` wants.

        Raises:
            QuotaExceeded: 429, none is free; it says when the oldest is, by the usual duration.
        """
        now = self._clock()
        with self._lock:
            if self._size is not None and len(self._began) >= self._size:
                wait_s = self._began[0] + self._usual_s - now
                raise QuotaExceeded("max_running", self._size, max(1, math.ceil(wait_s)))
            self._began.append(now)
        return now

    def leave(self, began: float, *, is_done: bool) -> None:
        """Frees a place, of a request that has ended or was never queued."""
        with self._lock:
            self._began.remove(began)
            if is_done:
                self._usual_s += 0.2 * (self._clock() - began - self._usual_s)
