"""Which requests are late unless they go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from bentoml_diffusers.engine.order.forecasts import lone_seconds

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from bentoml_diffusers.engine.order.work import Work


class Profile(Protocol):
    """What forwards cost."""

    def seconds(self, kind: Hashable, rows: int) -> float | None:
        """Returns how long a forward takes; ``None``: unknown."""

    @property
    def overhead(self) -> float:
        """Time of a request per time of its forwards."""


def note_urgency(works: Iterable[Work], now: float, profile: Profile) -> None:
    """Marks those that have less than twice the time that they need alone.

    One that cannot be done in time any more is not urgent: it would only make others late.
    """
    for work in works:
        if work.deadline is None or now < work.urgent_from:
            continue
        alone = lone_seconds(work, profile.seconds)
        if alone is None:
            continue
        alone *= profile.overhead
        left = work.deadline - now
        work.urgent_from = work.deadline - 2 * alone
        work.is_urgent = alone <= left <= 2 * alone
