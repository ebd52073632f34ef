"""The baton, and the forwards that requests share.

Every request runs the ordinary code of its pipeline in a thread of its own, but only the thread
that holds the baton runs. It gives the baton away at a forward of a shared module, and nowhere
else. When all threads wait at a forward, the oldest is joined with those of equal kind, run once by
one of their threads, and split.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.engine import joining
from bentoml_diffusers.engine.profile import CostProfile, bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from bentoml_diffusers.adapters import AdapterBank, Lease
    from bentoml_diffusers.adapters.runs import Pairs
    from bentoml_diffusers.engine.request import Ticket

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """The thread of one running request.

    Attributes:
        ticket: Says when to stop.
        alone: No other request may run beside this one.
        lease: Adapters of this request.
        batches: How often its forwards were shared by how many requests.
    """

    ticket: Ticket
    alone: bool = False
    lease: Lease | None = None
    batches: Counter[int] = field(default_factory=Counter)
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    task: list[_Job] | None = None


@dataclass(frozen=True, eq=False)
class SharedModule:
    """A function of a module whose calls by several requests can be joined.

    Attributes:
        name: Name of the component, with the method if it is not ``forward``.
        run: The real function.
        device: Where it computes.
        denoises: It is called at every step.
        max_rows: Largest batch.
        ignored: Arguments that the function takes but does not use.
        in_buckets: Batches are padded to powers of two: it is compiled for each size.
    """

    name: str
    run: Callable[..., Any]
    device: torch.device
    denoises: bool
    max_rows: int
    defaults: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    in_buckets: bool = False

    @property
    def component(self) -> str:
        """Name of the component without the method."""
        return self.name.partition(".")[0]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the arguments by name without those that say nothing; ``None``: unclear."""
        names = list(self.defaults)
        if len(args) > len(names):
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        order = [name for name in names if name in given]
        return {
            name: given[name]
            for name in [*order, *(name for name in given if name not in self.defaults)]
            if name not in self.ignored and not _is_default(given[name], self.defaults.get(name))
        }


def parameter_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns each named parameter of a function with its default value, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        item.name: item.default
        for item in inspect.signature(function).parameters.values()
        if item.kind in kinds
    }


@dataclass(eq=False)
class _Job:
    """A call that waits to be run."""

    member: Member
    module: SharedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: joining.Call | None
    kind: Hashable
    result: Any = None
    error: BaseException | None = None

    @property
    def key(self) -> Hashable:
        """Jobs of equal key can share a forward."""
        return id(self) if self.call is None else (id(self.module), self.call.key)

    @property
    def rows(self) -> int:
        return 1 if self.call is None else self.call.samples

    @property
    def pairs(self) -> Pairs:
        return self.member.lease.pairs if self.member.lease else ()


class Conductor:
    """Passes the baton and runs the shared forwards.

    Args:
        bank: The adapters; it is told which rows of a batch belong to whom.
        max_rows: Largest batch of a denoiser, rows.
    """

    def __init__(self, bank: AdapterBank, max_rows: int) -> None:
        self.profile = CostProfile(max_rows)
        self._forwards: Counter[int] = Counter()
        self._bank = bank
        self._mutex = threading.Lock()
        self._entering: deque[Member] = deque()
        self._ready: deque[Member] = deque()
        self._waiting: list[_Job] = []
        self._live = 0
        self._alone: Member | None = None
        self._is_held = False
        self.is_broken = False
        self._unjoinable: set[Hashable] = set()

    @property
    def forwards(self) -> Counter[int]:
        """How many forwards were shared by how many requests, until now."""
        with self._mutex:
            return Counter(self._forwards)

    @contextlib.contextmanager
    def turn(self, member: Member) -> Iterator[None]:
        """Holds the baton for the caller's thread while the block runs."""
        with self._mutex:
            self._entering.append(member)
            self._admit()
            if not self._is_held:
                self._pass_on()
        member.wake.acquire()
        try:
            yield
        finally:
            with self._mutex:
                self._live -= 1
                if self._alone is member:
                    self._alone = None
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
        kind = (module.name, *(part.shape[1:] for part in args[:1] if hasattr(part, "shape")))
        if self._is_lone() and not module.in_buckets:
            return self._run_lone(_Job(member, module, args, kwargs, None, kind))
        job = _Job(member, module, args, kwargs, self._take_apart(module, args, kwargs), kind)
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

    def _is_lone(self) -> bool:
        return self._live == 1 and not self._entering

    def _take_apart(
        self, module: SharedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> joining.Call | None:
        arguments = module.bind(args, kwargs)
        call = joining.take_apart(arguments) if arguments else None
        return None if _mark(module, call) in self._unjoinable else call

    # -- all below up to `_perform` runs under the mutex

    def _admit(self) -> None:
        """Lets new requests in, in order; one that must be alone waits until it is."""
        while self._entering and not self._alone:
            if self._entering[0].alone and self._live:
                return
            member = self._entering.popleft()
            self._alone = member if member.alone else None
            self._live += 1
            self._ready.append(member)

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
            with _error_of(job):
                job.member.ticket.check()
            self._ready.append(job.member)

    def _choose_group(self) -> list[_Job]:
        """Takes the oldest forward and those that can be joined with it.

        What comes before and after the steps goes first: so a new request shares the next step of
        the others, and a finished one does not wait for it. A request has few such forwards, and
        running requests are bounded: the steps' turn comes.
        """
        aside = (job for job in self._waiting if not job.module.denoises)
        oldest = next(aside, self._waiting[0])
        group = [job for job in self._waiting if job.key == oldest.key]
        waiting = sum(job.rows for job in group)
        limit = min(self.profile.choose_rows(oldest.kind, waiting), oldest.module.max_rows)
        chosen = [oldest]
        rows = oldest.rows
        for job in group[1:]:
            if rows + job.rows <= limit:
                chosen.append(job)
                rows += job.rows
        self._waiting = [job for job in self._waiting if job not in chosen]
        # Neighbours with the same LoRAs share their products.
        return sorted(chosen, key=lambda job: job.pairs)

    # -- all below runs with the baton

    def _perform(self, jobs: list[_Job]) -> None:
        self._run_joint(jobs)
        with self._mutex:
            self._ready.extend(job.member for job in jobs[1:])

    def _run_joint(self, jobs: list[_Job]) -> None:
        """Runs the jobs; each has a result or an error of its own afterwards."""
        if len(jobs) == 1 and not (jobs[0].call and jobs[0].module.in_buckets):
            with _error_of(jobs[0]):
                jobs[0].result = self._run_lone(jobs[0])
            return
        try:
            results = self._run_together(jobs)
        except torch.OutOfMemoryError as err:
            self._after_out_of_memory(jobs, err)
        except Exception as err:  # noqa: BLE001 - each is run again alone, and keeps its own error
            self._after_failure(jobs, err)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.result = result

    def _after_out_of_memory(self, jobs: list[_Job], error: Exception) -> None:
        torch.cuda.empty_cache()
        if len(jobs) == 1:
            jobs[0].error = error
            return
        self.profile.shrink(jobs[0].kind, sum(job.rows for job in jobs))
        half = len(jobs) // 2
        self._run_joint(jobs[:half])
        self._run_joint(jobs[half:])

    def _after_failure(self, jobs: list[_Job], error: Exception) -> None:
        for job in jobs:
            with _error_of(job):
                job.result = self._run_lone(job)
        if all(job.error is None and job.call is not None for job in jobs):
            logger.info("forwards of %s are not shared: %s", jobs[0].module.name, error)
            self._unjoinable.add(_mark(jobs[0].module, jobs[0].call))

    def _run_together(self, jobs: list[_Job]) -> list[Any]:
        module = jobs[0].module
        calls = [job.call for job in jobs if job.call is not None]
        counts = [call.samples for call in calls]
        rows = bucket(sum(counts)) if module.in_buckets else sum(counts)
        shares: list[tuple[Lease | None, int | None]] = [
            (job.member.lease, count) for job, count in zip(jobs, counts, strict=True)
        ]
        if rows > sum(counts):
            shares.append((None, rows - sum(counts)))
        arguments = joining.join(calls, rows)
        stop = self.profile.start(module.device, jobs[0].kind, rows)
        with self._bank.forwarding(module.component, shares):
            output = module.run(**arguments)
        stop()
        parts = joining.split(output, counts, rows)
        self._count(jobs)
        return parts

    def _run_lone(self, job: _Job) -> Any:
        rows = job.args[0].shape[0] if job.args and hasattr(job.args[0], "shape") else 1
        stop = self.profile.start(job.module.device, job.kind, rows)
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            result = job.module.run(*job.args, **job.kwargs)
        stop()
        self._count([job])
        return result

    def _count(self, jobs: Sequence[_Job]) -> None:
        with self._mutex:
            self._forwards[len(jobs)] += 1
        for job in jobs:
            job.member.batches[len(jobs)] += 1


@contextlib.contextmanager
def _error_of(job: _Job) -> Iterator[None]:
    try:
        yield
    except BaseException as err:  # noqa: BLE001 - raised again in the thread of its request
        job.error = err


def _mark(module: SharedModule, call: joining.Call | None) -> Hashable:
    return module.name, None if call is None else call.key


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)
