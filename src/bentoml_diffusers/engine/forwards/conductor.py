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
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.forwards.calls import Job, Member, SharedModule
from bentoml_diffusers.engine.forwards.processors import AttentionProcessors
from bentoml_diffusers.engine.forwards.profile import CostProfile
from bentoml_diffusers.engine.forwards.runner import Forwards
from bentoml_diffusers.engine.order import (
    Baton,
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
        # Guards the baton; never held while code of a pipeline or a module runs.
        self._mutex = threading.Lock()
        self._said: set[type[Any]] = set()
        self._processors = AttentionProcessors(modules)
        self._baton: Baton[Member, Job] = Baton(self._choose_group, self._processors.note)
        self.is_broken = False

    @property
    def forwards(self) -> Counter[int]:
        """How many forwards were shared by how many requests, until now."""
        return self._runs.counts

    @property
    def given(self) -> dict[str, float]:
        """What each caller has been given."""
        with self._mutex:
            return self._baton.turns.all_given()

    @contextlib.contextmanager
    def turn(self, member: Member) -> Iterator[None]:
        """Holds the baton for the caller's thread while the block runs."""
        with self._mutex:
            if self._baton.enter(member):
                self._pass_on()
        member.wake.acquire()
        try:
            yield
        finally:
            # Still with the baton: nobody else can run with these processors meanwhile.
            self._processors.take_back()
            with self._mutex:
                self._baton.leave(member)
                if not self._baton.live:
                    self.profile.rest()
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
        # Without the mutex: a request that enters right now joins at the next forward.
        if self._is_lone() and (member.owns_rows or not module.in_buckets):
            return self._runs.run_lone(Job(member, module, args, kwargs, None, kind))
        pairs = member.lease.pairs if member.lease else ()
        call = self._runs.take_apart(module, args, kwargs, pairs)
        job = Job(member, module, args, kwargs, call, kind)
        with self._mutex:
            self._baton.call(job)
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
            self._baton.step_back(member)
            self._pass_on()
        member.wake.acquire()
        member.ticket.check()
        self._processors.put(changes)

    def _is_lone(self) -> bool:
        return self._baton.live == 1 and not self._baton.entering

    def _pass_on(self) -> None:
        """Gives the baton to whose turn it is. Under the mutex, like what it calls."""
        try:
            member = self._baton.pass_on()
        except Exception as err:
            logger.error("requests cannot be scheduled", exc_info=err)
            self.is_broken = True
            self._baton.fail(err)
            member = self._baton.pass_on()
        if member is not None:
            member.wake.release()

    def _choose_group(self, waiting: list[Job]) -> list[Job]:
        """Takes those that run together next; see :mod:`bentoml_diffusers.engine.order`."""
        note_urgency([job.work for job in waiting], time.monotonic(), self.profile)
        chosen = choose_group(waiting, self._baton.turns, self.profile.choose_rows)
        record_group(chosen, waiting, self._baton.turns)
        # Neighbours with the same LoRAs share their products.
        return sorted(chosen, key=lambda job: job.pairs)

    def _perform(self, jobs: list[Job]) -> None:
        # Not under the mutex: requests enter, and are cancelled, while the device works.
        self._runs.run(jobs)
        with self._mutex:
            self._baton.share(jobs)
