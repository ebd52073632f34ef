"""The baton, and the forwards that requests share.

Every request runs the ordinary code of its pipeline in a thread of its own, but only the thread
that holds the baton runs. It gives the baton away at a forward of a shared module, and nowhere
else. When all threads wait at a forward, the order of work chooses one, which is joined with those
of equal kind, run once by one of their threads, and split.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.forwards.calls import Job, Member, SharedModule, error_of
from bentoml_diffusers.engine.forwards.processors import AttentionProcessors
from bentoml_diffusers.engine.forwards.profile import CostProfile
from bentoml_diffusers.engine.forwards.runner import Forwards
from bentoml_diffusers.engine.order import (
    Turns,
    choose_entry,
    choose_group,
    note_urgency,
    record_group,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator

    import torch

    from bentoml_diffusers.adapters import AdapterBank

logger = logging.getLogger(__name__)


class Conductor:
    """Passes the baton and runs the shared forwards.

    Args:
        bank: The adapters; it is told which rows of a batch belong to whom.
        max_rows: Largest batch of a denoiser, rows.
        modules: The shared modules.
    """

    def __init__(
        self, bank: AdapterBank, max_rows: int, modules: Iterable[torch.nn.Module] = ()
    ) -> None:
        self.profile = CostProfile(max_rows)
        self._runs = Forwards(bank, self.profile)
        self._mutex = threading.Lock()
        self._entering: deque[Member] = deque()
        self._ready: deque[Member] = deque()
        self._waiting: list[Job] = []
        self._turns = Turns()
        self._live = 0
        self._alone: Member | None = None
        self._is_held = False
        self.is_broken = False
        self._said: set[type[Any]] = set()
        self._processors = AttentionProcessors(modules)

    @property
    def forwards(self) -> Counter[int]:
        """How many forwards were shared by how many requests, until now."""
        return self._runs.counts

    @property
    def given(self) -> dict[str, float]:
        """What each caller has been given."""
        with self._mutex:
            return self._turns.all_given()

    @contextlib.contextmanager
    def turn(self, member: Member) -> Iterator[None]:
        """Holds the baton for the caller's thread while the block runs."""
        with self._mutex:
            self._entering.append(member)
            self._turns.enter(member.work)
            self._admit()
            if not self._is_held:
                self._pass_on()
        member.wake.acquire()
        try:
            yield
        finally:
            self._processors.take_back()
            with self._mutex:
                self._live -= 1
                self._turns.leave(member.work)
                if self._alone is member:
                    self._alone = None
                if not self._live:
                    self.profile.rest()
                self._admit()
                self._pass_on()

    def forward(
        self, member: Member, module: SharedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a call of a shared module, together with those of others if there are any.

        Raises:
            RequestCancelled: 503, the request was cancelled.
            DeadlineExceeded: 504, its time is over.
        """
        member.ticket.check()
        if not member.alone:
            self._isolate_changes(member)
        kind = (module.name, *(part.shape[1:] for part in args[:1] if hasattr(part, "shape")))
        if self._is_lone() and (member.owns_rows or not module.in_buckets):
            return self._runs.run_lone(Job(member, module, args, kwargs, None, kind))
        pairs = member.lease.pairs if member.lease else ()
        call = self._runs.take_apart(module, args, kwargs, pairs)
        job = Job(member, module, args, kwargs, call, kind)
        with self._mutex:
            self._waiting.append(job)
            self._pass_on()
        member.wake.acquire()
        if member.task is not None:
            jobs, member.task = member.task, None
            self._perform(jobs)
        if job.error is not None:
            raise job.error
        return job.result

    def _isolate_changes(self, member: Member) -> None:
        """Lets a request that replaced attention processors go on when no other one runs."""
        changes = self._processors.take_back()
        if not changes:
            return
        kind = type(changes[0][1])
        if kind not in self._said:
            self._said.add(kind)
            logger.info("requests with %s run alone", kind.__name__)
        member.alone = member.owns_rows = True
        with self._mutex:
            self._live -= 1
            self._entering.appendleft(member)
            self._admit()
            self._pass_on()
        member.wake.acquire()
        member.ticket.check()
        self._processors.put(changes)

    def _is_lone(self) -> bool:
        return self._live == 1 and not self._entering

    # -- all below up to `_perform` runs under the mutex

    def _admit(self) -> None:
        """Lets new requests in, in turn; one that must be alone waits until it is."""
        while self._entering and not self._alone:
            member = self._next_to_enter()
            if member.alone and self._live:
                return
            self._entering.remove(member)
            if member.alone:
                self._turns.charge(member.work, member.work.remaining)
            if not self._live:
                self._processors.note()
            self._alone = member if member.alone else None
            self._live += 1
            self._ready.append(member)

    def _next_to_enter(self) -> Member:
        """Only their order behind one that must be alone makes a difference."""
        if not any(member.alone for member in self._entering):
            return self._entering[0]
        work = choose_entry([member.work for member in self._entering], self._turns)
        return next(member for member in self._entering if member.work is work)

    def _pass_on(self) -> None:
        """Gives the baton to who can go on; if nobody can, to one who runs a group."""
        self._drop_stopped()
        if not self._ready and self._waiting:
            try:
                jobs = self._choose_group()
            except Exception as err:  # noqa: BLE001 - a defect of ours must not hang everybody
                self._give_up(err)
            else:
                jobs[0].member.task = jobs
                self._ready.append(jobs[0].member)
        self._is_held = bool(self._ready)
        if self._ready:
            self._ready.popleft().wake.release()

    def _give_up(self, error: Exception) -> None:
        logger.error("requests cannot be scheduled", exc_info=error)
        self.is_broken = True
        for job in self._waiting:
            job.error = error
            self._ready.append(job.member)
        self._waiting = []

    def _drop_stopped(self) -> None:
        """Lets requests that must stop go on, to find that out."""
        for member in [member for member in self._entering if member.ticket.must_stop]:
            self._entering.remove(member)
            self._live += 1
            self._ready.append(member)
        for job in [job for job in self._waiting if job.member.ticket.must_stop]:
            self._waiting.remove(job)
            with error_of(job):
                job.member.ticket.check()
            self._ready.append(job.member)

    def _choose_group(self) -> list[Job]:
        """Takes those that run together next; see :mod:`bentoml_diffusers.engine.order`."""
        note_urgency([job.work for job in self._waiting], time.monotonic(), self.profile)
        chosen = choose_group(self._waiting, self._turns, self.profile.choose_rows)
        record_group(chosen, self._waiting, self._turns)
        self._waiting = [job for job in self._waiting if job not in chosen]
        # Neighbours with the same LoRAs share their products.
        return sorted(chosen, key=lambda job: job.pairs)

    def _perform(self, jobs: list[Job]) -> None:
        self._runs.run(jobs)
        with self._mutex:
            self._ready.extend(job.member for job in jobs[1:])
