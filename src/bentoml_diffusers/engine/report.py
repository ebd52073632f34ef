"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.adapters import AdapterReport


@dataclass(frozen=True, kw_only=True)
class QueueReport:
    """What a request that comes now would wait for.

    Attributes:
        waiting: Requests in the queue.
        seconds: Until all of them have begun, by the pace of the last half minute; ``None`` if
            none was done in it, 0 if none waits and a request may begin at once.
    """

    waiting: int
    seconds: int | None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What an engine has done and does.

    Attributes:
        running: Requests that run.
        waiting: Requests in the queue.
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
