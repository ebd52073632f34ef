"""What a service tells Prometheus, through BentoML's own ``/metrics``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from bentoml_diffusers.errors import outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.errors import Outcome
    from bentoml_diffusers.serving.calls import Answer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_REQUESTS_PER_FORWARD = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one process; see ``docs/reference/http.md`` for their meaning."""

    def __init__(self) -> None:
        self._requests = Counter(
            "diffusers_requests", "Requests by task and outcome.", ["task", "outcome"]
        )
        self._queue_s = Histogram(
            "diffusers_queue_seconds", "Seconds before a request began.", ["task"], buckets=_SECONDS
        )
        self._run_s = Histogram(
            "diffusers_run_seconds", "Seconds that a request ran.", ["task"], buckets=_SECONDS
        )
        self._steps = Counter("diffusers_steps", "Denoising steps done.", ["task"])
        self._calls = Counter("diffusers_key_calls", "Calls by key and status.", ["key", "status"])
        self._work = Counter(
            "diffusers_key_pixel_steps", "Pixels times images times steps by key.", ["key"]
        )
        self._batches = Histogram(
            "diffusers_requests_per_forward",
            "Requests that shared a forward, counted by each of them.",
            buckets=_REQUESTS_PER_FORWARD,
        )

    def count_steps(self, task: str) -> Callable[[object], None]:
        """Returns what counts a step, also one of a request that is not answered in the end."""
        steps = self._steps.labels(task)
        return lambda _: steps.inc()

    def note_result(self, task: str, result: Answer) -> None:
        """Counts a request that was answered."""
        self._requests.labels(task, "done").inc()
        self._queue_s.labels(task).observe(result.queue_s)
        self._run_s.labels(task).observe(result.run_s)
        for size, forwards in result.batches.items():
            for _ in range(forwards):
                self._batches.observe(size)

    def note_call(self, key: str, status: int) -> None:
        """Counts a call that came with an API key."""
        self._calls.labels(key, str(status)).inc()

    def note_work(self, key: str, pixel_steps: int) -> None:
        """Counts what the requests of an API key asked for."""
        self._work.labels(key).inc(pixel_steps)

    def note_error(self, task: str, error: BaseException) -> None:
        """Counts a request that was not."""
        self.note_outcome(task, outcome_of(error))

    def note_outcome(self, task: str, outcome: Outcome) -> None:
        """Counts a request by its outcome."""
        self._requests.labels(task, outcome).inc()


@functools.cache
def process_metrics() -> Metrics:
    """Returns the metrics of this process: Prometheus takes each name once."""
    return Metrics()
