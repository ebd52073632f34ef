"""Who holds the baton: the state of the requests that run, without their threads."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from bentoml_diffusers.engine.order.policy import choose_entry
from bentoml_diffusers.engine.order.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.engine.order.work import Work


class Stoppable(Protocol):
    """A ticket."""

    @property
    def must_stop(self) -> bool:
        """True if ``check`` would raise."""

    def check(self) -> None:
        """Raises if the request must stop."""


class Holder(Protocol):
    """One of the requests that run."""

    ticket: Any
    alone: bool
    work: Work
    task: Any


class Call(Protocol):
    """A call of it that waits."""

    member: Any
    error: BaseException | None


M = TypeVar("M", bound=Holder)
J = TypeVar("J", bound=Call)


class Baton(Generic[M, J]):
    """Passes the baton among requests: at most one holds it. Not safe from several threads.

    Whoever gives it away, by :meth:`enter`, :meth:`leave`, :meth:`call` or :meth:`step_back`,
    then wakes who :meth:`pass_on` returns.

    Args:
        choose: Takes the calls that run together next out of those that wait.
        on_first: Called when a request enters while no other one is there.
    """

    def __init__(self, choose: Callable[[list[J]], list[J]], on_first: Callable[[], Any]) -> None:
        self._choose = choose
        self._on_first = on_first
        self.turns = Turns()
        self.entering: deque[M] = deque()
        self.ready: deque[M] = deque()
        self.waiting: list[J] = []
        self.live = 0
        self.alone: M | None = None
        self.is_held = False

    def enter(self, member: M) -> bool:
        """Lets a request in when it can be; returns whether the baton is to be passed on."""
        self.entering.append(member)
        self.turns.enter(member.work)
        self._admit()
        # While nobody holds it, nobody else would pass it on.
        return not self.is_held

    def leave(self, member: M) -> None:
        """Ends a request, which holds the baton."""
        self.live -= 1
        self.turns.leave(member.work)
        if self.alone is member:
            self.alone = None
        self._admit()

    def call(self, job: J) -> None:
        """Notes a call of the request that holds the baton."""
        self.waiting.append(job)

    def step_back(self, member: M) -> None:
        """Lets the request that holds the baton go on only when it is alone."""
        self.live -= 1
        # Before all others: it has begun, and holds its adapters' slots.
        self.entering.appendleft(member)
        self._admit()

    def share(self, jobs: list[J]) -> None:
        """Notes that a group was run; the first one's request goes on by itself."""
        # The first one's thread ran the group, and still holds the baton.
        self.ready.extend(job.member for job in jobs[1:])

    def pass_on(self) -> M | None:
        """Returns who can go on; if nobody can, one who runs a group, its ``task``."""
        self._drop_stopped()
        if not self.ready and self.waiting:
            jobs = self._choose(self.waiting)
            self.waiting = [job for job in self.waiting if job not in jobs]
            jobs[0].member.task = jobs
            self.ready.append(jobs[0].member)
        self.is_held = bool(self.ready)
        return self.ready.popleft() if self.ready else None

    def fail(self, error: Exception) -> None:
        """Ends all calls that wait with an error."""
        for job in self.waiting:
            job.error = error
            self.ready.append(job.member)
        self.waiting = []

    def _admit(self) -> None:
        """Lets new requests in, in turn; one that must be alone waits until it is."""
        while self.entering and not self.alone:
            member = self._next_to_enter()
            if member.alone and self.live:
                return
            self.entering.remove(member)
            if member.alone:
                # None of its forwards will be charged: alone it does not wait for its turn.
                self.turns.charge(member.work, member.work.remaining)
            if not self.live:
                self._on_first()
            self.alone = member if member.alone else None
            self.live += 1
            self.ready.append(member)

    def _next_to_enter(self) -> M:
        """Only their order behind one that must be alone makes a difference."""
        if not any(member.alone for member in self.entering):
            return self.entering[0]
        work = choose_entry([member.work for member in self.entering], self.turns)
        return next(member for member in self.entering if member.work is work)

    def _drop_stopped(self) -> None:
        """Lets requests that must stop go on, to find that out."""
        for member in [member for member in self.entering if member.ticket.must_stop]:
            self.entering.remove(member)
            # Counted without a look at who is alone: it only raises, and `leave` counts it down.
            self.live += 1
            self.ready.append(member)
        for job in [job for job in self.waiting if job.member.ticket.must_stop]:
            self.waiting.remove(job)
            try:
                job.member.ticket.check()
            except BaseException as err:  # noqa: BLE001 - raised again in the thread of its request
                job.error = err
            self.ready.append(job.member)
