"""Who takes part: tickets, members, jobs and slots, as the engine has them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable

    from bentoml_diffusers.engine.order import Work
    from tools.simulation.world import World


class Broken(AssertionError):
    """A promise was not kept."""


class Stop(Exception):
    """How a request ended that was not done."""


@dataclass(eq=False)
class Ticket:
    """As the engine's, on the clock of a world."""

    world: World
    deadline: float | None
    steps_done: int = 0
    steps_total: int | None = None
    is_cancelled: bool = False

    @property
    def must_stop(self) -> bool:
        """True if ``check`` would raise."""
        return self.is_cancelled or (self.deadline is not None and self.world.now > self.deadline)

    def check(self) -> None:
        """Raises if the request must stop."""
        if self.must_stop:
            raise Stop("cancelled" if self.is_cancelled else "late")


@dataclass(eq=False)
class Member:
    """A request, and its thread."""

    name: int
    ticket: Ticket
    work: Work
    alone: bool
    loras: frozenset[int]
    size: int
    rows: int
    load_s: float
    is_corrupt: bool
    dies_at: int
    previews: int
    task: Any = None
    job: Job | None = None
    thread: Generator[tuple[Any, ...], None, None] | None = None
    answer: str | None = None
    since: int = 0
    callers: int = 0
    aged_at: int | None = None
    allowed: int = 0


@dataclass(eq=False)
class Job:
    """A call that waits."""

    member: Member
    kind: Hashable
    rows: int
    is_step: bool
    max_rows: int = 64
    error: BaseException | None = None
    key: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.kind

    @property
    def work(self) -> Work:
        """That of its request."""
        return self.member.work


class Slots:
    """LoRAs in slots, as the adapter pool holds them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: Counter[int] = Counter()
        self.resident: set[int] = set()

    def acquire(self, wanted: frozenset[int]) -> bool:
        """Holds LoRAs; returns whether there was room."""
        pinned = {one for one in self.resident if self.held[one]} | wanted
        if len(pinned) > self.size:
            return False
        for one in sorted(self.resident - pinned)[
            : max(0, len(self.resident | wanted) - self.size)
        ]:
            self.resident.discard(one)
        self.resident |= wanted
        self.held.update(wanted)
        return True

    def release(self, wanted: frozenset[int]) -> None:
        """Gives them up."""
        self.held.subtract(wanted)
