"""The calls that run in this worker, by the id of their request: so that they can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from bentoml_diffusers.errors import RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from bentoml_diffusers.serving.calls import Caller

T = TypeVar("T")


class Run:
    """One call while it runs, as tasks of the event loop, one for each image."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []
        self._reason: str | None = None

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a part of it."""
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    def cancel(self, reason: str) -> None:
        """Stops it, within one denoising step."""
        self._reason = reason
        self.stop()

    def stop(self) -> None:
        """Stops what still runs of it."""
        for task in self._tasks:
            task.cancel()

    def check(self) -> None:
        """Raises if it was cancelled, or a part failed.

        Raises:
            RequestCancelled: 503, it was cancelled.
            DiffusersError: What became of a part.
        """
        if self._reason is not None:
            raise RequestCancelled(self._reason)
        for task in self._tasks:
            if task.done():
                task.result()

    async def wait(self, tasks: Sequence[asyncio.Task[T]]) -> list[T]:
        """Returns what the parts return.

        Raises:
            RequestCancelled: 503, it was cancelled.
            DiffusersError: What became of the first part that failed.
        """
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        self.check()
        return [task.result() for task in tasks]


class Running:
    """All calls that run. For the thread of one event loop."""

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[Caller, Run]]] = {}

    @contextlib.contextmanager
    def add(self, request_id: str, caller: Caller) -> Iterator[Run]:
        """Gives a run that can be cancelled until the end of the block, and stops then."""
        entry = (caller, Run())
        self._runs.setdefault(request_id, []).append(entry)
        try:
            yield entry[1]
        finally:
            entry[1].stop()
            self._runs[request_id].remove(entry)
            if not self._runs[request_id]:
                del self._runs[request_id]

    def cancel(self, request_id: str, caller: Caller, reason: str) -> bool:
        """Cancels what a caller runs under an id; ``False`` if there is nothing."""
        own = [run for owner, run in self._runs.get(request_id, ()) if owner == caller]
        for run in own:
            run.cancel(reason)
        return bool(own)
