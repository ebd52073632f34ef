"""Reports of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.adapters import AdapterReport


@dataclass(frozen=True, kw_only=True)
class QueueReport:
    """What a new request would wait for.

    Attributes:
        waiting: Requests in the queue.
        seconds: Estimated seconds until all of them have begun, by the pace of the last half
            minute; ``None`` if nothing was done in it, 0 if a new request would begin at once.
    """

    waiting: int
    seconds: int | None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """State and statistics of an engine.

    Attributes:
        running: Number of running requests.
        waiting: Number of requests in the queue.
        counts: Requests by outcome: ``done``, or that of their error, see
            :mod:`bentoml_diffusers.errors`; and ``submitted``, those that came into the queue.
        forwards: How many forwards were shared by how many requests.
        seconds_per_row: For each kind of forward, its median cost by batch size in rows.
        adapters: LoRAs and textual inversions.
    """

    running: int
    waiting: int
    counts: Mapping[str, int]
    forwards: Mapping[int, int]
    seconds_per_row: Mapping[Any, Mapping[int, float]]
    adapters: AdapterReport
