"""What a service tells Prometheus, through BentoML's own ``/metrics``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from bentoml_diffusers.errors import DeadlineExceeded, QueueFull, RequestCancelled

if TYPE_CHECKING:
    from bentoml_diffusers.engine import Result

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
        self._batches = Histogram(
            "diffusers_requests_per_forward",
            "Requests that shared a forward, counted by each of them.",
            buckets=_REQUESTS_PER_FORWARD,
        )

    def note_result(self, task: str, result: Result) -> None:
        """Counts a request that was answered."""
        self._requests.labels(task, "done").inc()
        self._queue_s.labels(task).observe(result.queue_s)
        self._run_s.labels(task).observe(result.run_s)
        self._steps.labels(task).inc(result.steps)
        for size, forwards in result.batches.items():
            for _ in range(forwards):
                self._batches.observe(size)

    def note_error(self, task: str, error: BaseException) -> None:
        """Counts a request that was not."""
        self._requests.labels(task, _name_outcome(error)).inc()


@functools.cache
def process_metrics() -> Metrics:
    """Returns the metrics of this process: Prometheus takes each name once."""
    return Metrics()


def _name_outcome(error: BaseException) -> str:
    kinds = {QueueFull: "refused", DeadlineExceeded: "expired", RequestCancelled: "cancelled"}
    status = getattr(error, "error_code", 500)
    return kinds.get(type(error), "invalid" if status < 500 else "failed")
