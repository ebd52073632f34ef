"""The jobs of a service, as its dialects ask for them."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.serving.choices import pin_choices
from bentoml_diffusers.serving.jobs.results import Results, is_signed, sign
from bentoml_diffusers.serving.jobs.states import Job, JobNotFound
from bentoml_diffusers.serving.jobs.worker import JobWorker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.serving.calls import Caller
    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.options import JobOptions


class Jobs:
    """Takes jobs, says what becomes of them, and runs them. Safe from any thread; blocks.

    Args:
        options: Where they are kept.
        service: Name of the service.
        dispatcher: Runs them, in the thread of the jobs alone.

    Raises:
        InvalidOption: 400, a database or a place for results that cannot be used.
    """

    def __init__(self, options: JobOptions, service: str, dispatcher: Dispatcher) -> None:
        from bentoml_diffusers.serving.jobs.table import JobTable

        self._options = options
        self._table = JobTable(
            options.database_url,
            service,
            lease_s=options.lease_s,
            max_attempts=options.max_attempts,
        )
        self._results = Results(f"{options.results_url}/{service}")
        self._worker = JobWorker(self._table, self._results, dispatcher, options)

    def close(self) -> None:
        """Stops its worker, whose jobs wait again."""
        self._worker.close()
        self._table.close()

    def add(
        self,
        caller: Caller,
        task: str,
        values: Mapping[str, Any],
        *,
        job_id: str | None = None,
        asked: Mapping[str, Any] | None = None,
        n: int,
        output_format: str,
    ) -> Job:
        """Takes a job; it is on disk when this returns.

        The seed is drawn and adapters get their versions now, so that it gives the same whenever
        it is run, and however often.

        Args:
            caller: Who asks.
            task: Of the service.
            values: Of its native fields, as JSON, checked.
            job_id: Of the caller's own; the same wish under it is the same job.
            asked: What the caller sent, to be shown again.
            n: Images.
            output_format: Of them.

        Raises:
            JobConflict: 409, the id is that of another job.
            JobsFull: 429, too many wait.
        """
        seed = values.get("seed")
        drawn = secrets.randbits(32) if seed in (None, -1) else seed
        job = Job(
            id=job_id or secrets.token_hex(13),
            owner=owner_of(caller),
            task=task,
            values={**pin_choices(values), "seed": drawn},
            n=n,
            output_format=output_format,
            priority=caller.priority,
            asked=asked or {},
            created=time.time(),
        )
        added = self._table.add(job, self._options.max_waiting)
        self._worker.wake()
        return added

    def get(self, caller: Caller, job_id: str) -> Job:
        """Returns a job of a caller.

        Raises:
            JobNotFound: 404, no job, or of another key.
        """
        job = self._table.get(job_id)
        if caller.name and job.owner != owner_of(caller):
            raise JobNotFound(job_id)
        return job

    def list_jobs(
        self, caller: Caller, *, before: int | None = None, limit: int = 100
    ) -> list[tuple[int, Job]]:
        """Returns jobs of a caller, the latest first, each with its number for ``before``."""
        return self._table.list_jobs(owner_of(caller), before=before, limit=limit)

    def position(self, job: Job) -> int:
        """Returns how many jobs wait that came earlier."""
        return self._table.position(job)

    def cancel(self, caller: Caller, job_id: str) -> Job:
        """Cancels a job; one that runs stops within a step, wherever it runs.

        Raises:
            JobNotFound: 404, no job, or of another key.
        """
        self.get(caller, job_id)
        self._table.cancel(job_id)
        return self._table.get(job_id)

    def sign(self, path: str) -> str:
        """Returns the address of an image, good for some time."""
        return sign(path, self._table.secret, self._options.url_lifetime_s)

    def read(self, path: str, query: Mapping[str, str], job_id: str, name: str) -> bytes:
        """Returns an image by its address.

        Raises:
            JobNotFound: 404, no such image, or an address that is not, or no longer, good.
        """
        if not is_signed(path, query, self._table.secret):
            raise JobNotFound(job_id)
        known = name in self._table.get(job_id).files
        data = self._results.read(job_id, name) if known else None
        if data is None:
            raise JobNotFound(job_id)
        return data


def owner_of(caller: Caller) -> str:
    """Whose job it is: that of a key, else of whoever asks from an address."""
    return caller.name or f"address {caller.address}"
