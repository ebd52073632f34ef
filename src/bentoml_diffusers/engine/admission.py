"""The bounded queue in front of the engine: who runs, who waits, who is refused."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bentoml_diffusers.engine.order import Queue
from bentoml_diffusers.engine.report import QueueReport
from bentoml_diffusers.errors import (
    DiffusersError,
    QueueFull,
    RequestCancelled,
    outcome_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bentoml_diffusers.engine.order import Work
    from bentoml_diffusers.engine.requests import Request, Result, Ticket
    from bentoml_diffusers.options import EngineLimits

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Entry:
    """One request with its future."""

    request: Request
    ticket: Ticket
    future: Future[Result] = field(default_factory=Future)
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.request.work(self.ticket)
        self.future.set_running_or_notify_cancel()  # it is cancelled by its ticket alone


class Admission:
    """Starts requests, callers in turn, and refuses what is too much.

    Args:
        limits: How many may run and wait.
        run: Runs one request in the calling thread.
    """

    def __init__(self, limits: EngineLimits, run: Callable[[Entry], Result]) -> None:
        self._counts: Counter[str] = Counter()
        self._run = run
        self._threads = ThreadPoolExecutor(limits.max_running, "diffusers-engine")
        self._lock = threading.Condition()
        self._queue: Queue[Entry] = Queue(
            limits.max_running, limits.max_queue, limits.max_pixel_steps
        )
        self._rate = _Rate()
        self._clock: threading.Thread | None = None
        self._closed = False

    @property
    def counts(self) -> Counter[str]:
        """Requests by outcome, until now."""
        with self._lock:
            return Counter(self._counts)

    @property
    def is_closed(self) -> bool:
        """True from the call of :meth:`close` on."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue.waiting)

    @property
    def running(self) -> int:
        """Requests that have been started."""
        return len(self._queue.running)

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts what is wrong with a request before it is in the queue."""
        try:
            yield
        except DiffusersError as err:
            with self._lock:
                self._counts[err.outcome] += 1
            raise

    def submit(self, entry: Entry) -> None:
        """Queues a request.

        Raises:
            QueueFull: 429, says in how many seconds to come again.
            RequestCancelled: 503, closed.
        """
        with self._lock:
            if self._closed:
                raise RequestCancelled("the engine is closed")
            if not self._queue.has_room(entry.work):
                seconds = self._rate.seconds_for(self._queue.work)
                raise QueueFull(len(self._queue.waiting), seconds)
            self._counts["submitted"] += 1
            self._queue.add(entry.work, entry)
            self._start_next()
            if entry.ticket.deadline is not None and not entry.future.done():
                self._start_clock()
                self._lock.notify_all()

    def withdraw(self, entry: Entry) -> None:
        """Frees the place of a request that waits; one that runs looks at its ticket itself."""
        with self._lock:
            if not self._queue.withdraw(entry.work):
                return
        self._finish(entry, RequestCancelled())

    def look_at_queue(self) -> QueueReport:
        """Returns how many wait, and for how long."""
        with self._lock:
            queue = self._queue
            is_free = queue.has_place and not queue.waiting
            seconds = 0 if is_free else self._rate.estimate(queue.work)
            return QueueReport(waiting=len(queue.waiting), seconds=seconds)

    def look(self) -> tuple[list[Entry], list[Entry], dict[str, float]]:
        """Returns who runs, who waits, and what callers have been given."""
        with self._lock:
            queue = self._queue
            running, waiting = list(queue.running.values()), list(queue.waiting.values())
            return running, waiting, queue.turns.all_given()

    def close(self, *, cancel: bool) -> None:
        """Takes no more requests; returns when all are answered."""
        with self._lock:
            self._closed = True
            entries = [*self._queue.waiting.values(), *self._queue.running.values()]
            self._lock.notify_all()
        if cancel:
            for entry in entries:
                entry.ticket.cancel()
                self.withdraw(entry)
        for entry in entries:
            entry.future.exception()
        self._threads.shutdown(wait=True)
        if self._clock is not None:
            self._clock.join()

    def _start_next(self) -> None:
        while (entry := self._queue.start_next()) is not None:
            self._threads.submit(self._serve, entry)

    def _serve(self, entry: Entry) -> None:
        outcome: Result | BaseException
        try:
            outcome = self._run(entry)
        except BaseException as err:  # noqa: BLE001 - handed to the caller by the future
            outcome = err
        self._finish(entry, outcome)

    def _finish(self, entry: Entry, outcome: Result | BaseException) -> None:
        with self._lock:
            self._queue.finish(entry.work)
            if isinstance(outcome, BaseException):
                self._counts[outcome_of(outcome)] += 1
            else:
                self._counts["done"] += 1
                self._rate.add(entry.request.pixel_steps)
            self._start_next()
        if isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = threading.Thread(
                target=self._watch_deadlines, name="diffusers-deadlines", daemon=True
            )
            self._clock.start()

    def _watch_deadlines(self) -> None:
        """Answers requests whose time is over while they wait."""
        while True:
            with self._lock:
                if self._closed and not self._queue.waiting:
                    return
                waiting = self._queue.waiting.values()
                late = [entry for entry in waiting if entry.ticket.must_stop]
                for entry in late:
                    self._queue.withdraw(entry.work)
                if not late:
                    self._lock.wait(self._next_deadline_s())
            for entry in late:
                self._finish(entry, _reason_to_stop(entry.ticket))

    def _next_deadline_s(self) -> float | None:
        moments = [work.deadline for work in self._queue.waiting]
        known = [moment for moment in moments if moment is not None]
        return max(0.0, min(known) - time.monotonic()) + 0.001 if known else None


class _Rate:
    """Pixel-steps per second over the last half minute."""

    _WINDOW_S = 30.0

    def __init__(self) -> None:
        self._done: deque[tuple[float, int]] = deque()
        self._start = time.monotonic()

    def add(self, pixel_steps: int) -> None:
        now = time.monotonic()
        self._done.append((now, pixel_steps))
        while self._done[0][0] < now - self._WINDOW_S:
            self._done.popleft()

    def seconds_for(self, pixel_steps: int) -> int:
        """Returns an estimate in whole seconds, from 1 to 600."""
        return self.estimate(pixel_steps) or 1

    def estimate(self, pixel_steps: int) -> int | None:
        """Returns the same; ``None`` if nothing was done yet."""
        span = min(self._WINDOW_S, time.monotonic() - self._start)
        done = sum(work for _, work in self._done)
        return min(600, max(1, math.ceil(pixel_steps * span / done))) if done else None


def _reason_to_stop(ticket: Ticket) -> BaseException:
    try:
        ticket.check()
    except DiffusersError as err:
        return err
    return RequestCancelled()
