"""Runs jobs in a thread with an event loop of its own, beside the requests of a service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import DiffusersError, QueueFull, RequestCancelled
from bentoml_diffusers.serving.calls import Answer, Call, Caller, Step
from bentoml_diffusers.serving.error_answers import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bentoml_diffusers.serving.dispatcher import Dispatcher
    from bentoml_diffusers.serving.jobs.results import Results
    from bentoml_diffusers.serving.jobs.states import Job
    from bentoml_diffusers.serving.jobs.table import JobTable
    from bentoml_diffusers.serving.options import JobOptions

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # for jobs that other workers, or other services, added
_STOP_S = 0.25  # a cancel reaches the worker within it, and the device within a step more
_RENEW_S = 1.0  # each is a write to the disk
_CLEAN_S = 60.0
_CLOSING_S = 10.0


class JobWorker:
    """Takes jobs from the table and ends each of them. Begins at once.

    Args:
        table: Of the jobs.
        results: Where images go.
        dispatcher: Runs them; of this worker alone, in its own event loop.
        options: How many at once.
    """

    def __init__(
        self, table: JobTable, results: Results, dispatcher: Dispatcher, options: JobOptions
    ) -> None:
        self._table, self._results = table, results
        self._dispatcher, self._options = dispatcher, options
        self._name = secrets.token_hex(8)
        self._running: dict[str, _Running] = {}
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._main, name="diffusers-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Has it look for jobs now. Safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """Stops; jobs that run wait again, and another worker begins them anew."""
        self._is_closing = True
        self.wake()
        self._thread.join(_CLOSING_S)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        finally:
            self._loop.close()

    async def _work(self) -> None:
        duties = ((_STOP_S, self._stop_cancelled), (_RENEW_S, self._renew), (_CLEAN_S, self._clean))
        beside = [asyncio.ensure_future(self._repeat(*duty)) for duty in duties]
        try:
            while not self._is_closing:
                self._news.clear()
                if not await self._begin_next():
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._news.wait(), _LOOK_S)
        finally:
            for one in self._running.values():
                one.task.cancel()
            await asyncio.gather(
                *(one.task for one in self._running.values()), return_exceptions=True
            )
            for duty in beside:
                duty.cancel()

    async def _begin_next(self) -> bool:
        """Begins the next job; ``False`` if none waits, or there is no room."""
        if len(self._running) >= self._options.max_running:
            return False
        try:
            job = await asyncio.to_thread(self._table.claim, self._name)
        except Exception:
            logger.exception("the table of jobs does not answer")
            return False
        if job is None:
            return False
        task = asyncio.ensure_future(self._run(job))
        self._running[job.id] = _Running(job, task)
        task.add_done_callback(lambda _: self._forget(job.id))
        return True

    def _forget(self, job_id: str) -> None:
        self._running.pop(job_id, None)
        self._news.set()

    async def _run(self, job: Job) -> None:
        """Runs a job to its end. What is not its own fault lets it wait again."""
        try:
            answer = await self._generate(job)
            files = [await self._store(job, index, answer) for index in range(len(answer.results))]
        except QueueFull as error:
            await asyncio.sleep(min(error.retry_after_s, 2))
            await asyncio.to_thread(self._table.give_back, self._latest(job))
        except asyncio.CancelledError:
            await asyncio.to_thread(self._settle_stopped, self._latest(job))
        except DiffusersError as error:
            if isinstance(error, RequestCancelled):
                await asyncio.to_thread(self._settle_stopped, self._latest(job))
            else:
                text = describe_error(error)["error"]
                await self._finish(job, "failed", error=text)
        except Exception:
            logger.exception("job %s failed", job.id)
            await self._finish(
                job, "failed", error="it could not be run; the server's log says why"
            )
        else:
            await self._finish(job, "succeeded", files=files, seeds=answer.seeds)

    async def _generate(self, job: Job) -> Answer:
        arguments = await self._dispatcher.read(job.task, job.values)
        call = Call(
            task=job.task,
            arguments={**arguments, "timeout_s": self._options.timeout_s},
            n=job.n,
            request_id=job.id,
            caller=Caller(name=job.owner, priority=job.priority),
        )
        answers: list[Answer] = []
        async with contextlib.aclosing(self._dispatcher.stream(call)) as events:
            async for event in events:
                if isinstance(event, Step) and job.id in self._running:
                    self._running[job.id].note(event)
                if isinstance(event, Answer):
                    answers.append(event)
        return answers[0]

    async def _store(self, job: Job, index: int, answer: Answer) -> str:
        encoded = await self._dispatcher.encode(answer.results[index], job.output_format)
        # An attempt has files of its own: nobody writes where somebody else may write.
        name = f"{job.attempt}-{index}.{job.output_format}"
        await asyncio.to_thread(self._results.write, job.id, name, encoded.data)
        return name

    async def _finish(self, job: Job, status: str, **facts: object) -> None:
        finish: Callable[..., bool] = self._table.finish
        if not await asyncio.to_thread(finish, self._latest(job), status, **facts):
            logger.warning("job %s is another worker's by now: its result is dropped", job.id)

    def _settle_stopped(self, job: Job) -> None:
        """A job that its caller cancelled ends; one that this worker drops waits again."""
        if self._table.get(job.id).cancelling:
            self._table.finish(job, "canceled")
        else:
            self._table.give_back(job)

    def _latest(self, job: Job) -> Job:
        return self._running[job.id].job if job.id in self._running else job

    async def _renew(self) -> None:
        if not self._running:
            return
        jobs = [one.job for one in self._running.values()]
        self._stop(await asyncio.to_thread(self._table.renew, jobs))

    async def _stop_cancelled(self) -> None:
        if self._running:
            self._stop(await asyncio.to_thread(self._table.list_cancelled, self._name))

    def _stop(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            if job_id in self._running:
                self._running[job_id].task.cancel()

    async def _clean(self) -> None:
        for job in await asyncio.to_thread(self._table.delete_older, self._options.keep_s):
            await asyncio.to_thread(self._results.delete, job.id)

    async def _repeat(self, pause_s: float, work: Callable[[], object]) -> None:
        while True:
            began = time.monotonic()
            try:
                await work()  # type: ignore[misc]
            except Exception:
                logger.exception("the table of jobs does not answer")
            await asyncio.sleep(max(0.01, pause_s - (time.monotonic() - began)))


class _Running:
    """A job while it runs here."""

    def __init__(self, job: Job, task: asyncio.Task[None]) -> None:
        self.job, self.task = job, task
        self._steps: dict[int, tuple[int, int]] = {}

    def note(self, step: Step) -> None:
        self._steps[step.index] = (step.step, step.of)
        done, of = map(sum, zip(*self._steps.values(), strict=True))
        self.job = replace(self.job, step=done, of=max(of, step.of * self.job.n))
