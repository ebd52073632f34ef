"""When requests will be done, and which deadlines cannot be kept."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from bentoml_diffusers.engine.order import Estimate, Load, forecast, lone_seconds
from bentoml_diffusers.errors import DeadlineExceeded, DeadlineUnreachable

if TYPE_CHECKING:
    from bentoml_diffusers.engine.admission import Admission, Entry
    from bentoml_diffusers.engine.order import Work
    from bentoml_diffusers.engine.worker import Worker

# A deadline is refused if the estimate is beyond it by this factor: estimates err, too.
_MARGIN = 1.15
_MAX_RETRY_S = 600


class Estimates:
    """Estimates for the requests of one engine. Safe from any thread.

    Args:
        admission: Knows who runs and waits.
        worker: Knows what forwards cost.
    """

    def __init__(self, admission: Admission, worker: Worker) -> None:
        self._admission = admission
        self._worker = worker

    def look(self, entry: Entry) -> Estimate:
        """Returns where a request stands."""
        load = self._load()
        if entry.work not in load.running and entry.work not in load.waiting:
            return Estimate(0, 0.0, 0.0)
        ahead = load.waiting.index(entry.work) if entry.work in load.waiting else -1
        seconds = forecast(entry.work, load)
        if seconds is None:
            return Estimate(ahead + 1, 0.0 if ahead < 0 else None)
        return Estimate(ahead + 1, *seconds)

    def check_deadline(self, entry: Entry) -> None:
        """Refuses at once what cannot be done in time, where that is known.

        Raises:
            DeadlineUnreachable: 503, it would be late, because of those before it.
            DeadlineExceeded: 504, it would be late alone, too.
        """
        work = entry.work
        if work.deadline is None or not self._know(entry):
            return
        allowed = (work.deadline - time.monotonic()) * _MARGIN
        seconds, overhead = self._worker.conductor.profile.seconds, self._overhead()
        alone = lone_seconds(work, seconds)
        if alone is None or allowed <= 0:
            return  # what is late already is answered so
        if alone * overhead > allowed:
            raise DeadlineExceeded(entry.ticket.timeout_s or 0.0, alone * overhead)
        load = self._load()
        others = [lone_seconds(one, seconds) for one in (*load.running, *load.waiting)]
        known = [one for one in others if one is not None]
        if len(known) < len(others) or (alone + sum(known)) * overhead <= allowed:
            return  # mostly: even one after the other there is time for all
        found = forecast(work, load.with_new(work))
        if found is not None and found[1] > allowed:
            after = math.ceil(found[1] - allowed / _MARGIN)
            raise DeadlineUnreachable(found[1], min(_MAX_RETRY_S, max(1, after)))

    def _know(self, entry: Entry) -> bool:
        work = entry.work
        if work.pace is None:
            work.pace = self._worker.paces.get(entry.request.signature)
        return work.pace is not None

    def _overhead(self) -> float:
        return self._worker.conductor.profile.overhead

    def _load(self) -> Load:
        running, waiting, started = self._admission.look()
        for entry in (*running, *waiting):
            self._know(entry)
        conductor = self._worker.conductor
        return Load(
            running=_works(running),
            waiting=_works(waiting),
            given=conductor.given,
            started=started,
            places=self._worker.places,
            seconds=conductor.profile.seconds,
            choose_rows=conductor.profile.choose_rows,
            overhead=self._overhead(),
        )


def _works(entries: list[Entry]) -> list[Work]:
    return [entry.work for entry in entries]
