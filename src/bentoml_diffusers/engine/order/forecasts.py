"""When a request will be done: the policy, run ahead at the measured cost of forwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bentoml_diffusers.engine.order.policy import choose_group, choose_start, record_group
from bentoml_diffusers.engine.order.turns import Turns
from bentoml_diffusers.engine.order.work import NoSteps, Work

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bentoml_diffusers.engine.order.paces import Pace, Seconds
    from bentoml_diffusers.engine.order.work import ChooseRows

# With several callers they are taken in turn in portions of a request; alone, request by request.
_PORTIONS = 4


@dataclass(frozen=True)
class Estimate:
    """Where a request stands.

    Attributes:
        position: How many requests wait before it, plus one; 0 once it has started.
        start_s: Seconds until it starts, as far as that is known.
        finish_s: Seconds until it is done, as far as that is known.
    """

    position: int
    start_s: float | None = None
    finish_s: float | None = None


@dataclass(frozen=True)
class Load:
    """All requests of an engine at one moment, and what it knows of their cost.

    Attributes:
        running: Those that have started.
        waiting: Those that wait, in the order in which they came.
        given: What callers have been given, for the order of the running.
        started: The same for who starts.
        places: How many may run.
        seconds: How long a forward of a kind takes with so many rows.
        choose_rows: How many rows share one.
        overhead: Time of a request per time of its forwards.
    """

    running: Sequence[Work]
    waiting: Sequence[Work]
    given: Mapping[str, float]
    started: Mapping[str, float]
    places: int
    seconds: Seconds
    choose_rows: ChooseRows
    overhead: float = 1.0

    def with_new(self, work: Work) -> Load:
        """Returns the load with one more request."""
        return replace(self, waiting=[*self.waiting, work])


@dataclass(eq=False)
class _Step:
    """The next step of a request, as the policy sees it."""

    work: Work
    pace: Pace
    is_step: bool = True
    max_rows: int = 1 << 30
    kind: Hashable = field(init=False)
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.kind, self.rows = self.pace.kind, self.pace.rows

    @property
    def key(self) -> Hashable:
        return self.kind

    @property
    def steps_left(self) -> int:
        return max(1, math.ceil(self.work.remaining / self.work.pixels))


def lone_seconds(work: Work, seconds: Seconds) -> float | None:
    """Returns how long the rest of a request takes alone; ``None``: unknown."""
    step = work.pace.step_seconds(seconds) if work.pace else None
    if work.pace is None or step is None:
        return None
    return step * work.remaining / work.pixels + work.pace.fixed_seconds(seconds)


def forecast(target: Work, load: Load) -> tuple[float, float] | None:
    """Returns in how many seconds a request starts and is done.

    Requests that will come are not foreseen. ``None`` if the cost of any of them is not known.
    """
    if any(work.pace is None for work in (*load.running, *load.waiting)):
        return None
    return _Ahead(load).run(target)


class _Ahead:
    """The requests of a load, on a clock of their own."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._copies = {work: _copy(work) for work in (*load.running, *load.waiting)}
        self._turns = _turns_of([self._copies[work] for work in load.running], load.given)
        self._starts = _turns_of([*self._copies.values()], load.started)
        self._waiting = [self._copies[work] for work in load.waiting]
        self._steps = [_step_of(self._copies[work]) for work in load.running]
        self._portions = _PORTIONS if len({work.caller for work in self._copies}) > 1 else 1
        self._now = 0.0

    def run(self, target: Work) -> tuple[float, float] | None:
        mine = self._copies[target]
        started = 0.0
        while True:
            self._start()
            if mine in self._waiting:
                started = math.nan
            elif math.isnan(started):
                started = self._now
            if not self._steps:
                return None
            done = self._advance()
            if done is None:
                return None
            if mine in done:
                overhead = self._load.overhead
                return started * overhead, self._now * overhead

    def _start(self) -> None:
        while self._waiting:
            running = [step.work for step in self._steps]
            work = choose_start(self._waiting, running, self._load.places, self._starts)
            if work is None:
                return
            self._waiting.remove(work)
            self._starts.charge(work, work.total)
            self._turns.enter(work)
            self._steps.append(_step_of(work))

    def _advance(self) -> list[Work] | None:
        """Runs the next group until one of it is done, or for a portion of it."""
        group = choose_group(self._steps, self._turns, self._load.choose_rows)
        rows = sum(step.rows for step in group)
        cost = group[0].pace.step_seconds(self._load.seconds, rows)
        if cost is None:
            return None
        count = min(step.steps_left for step in group)
        portion = math.ceil(group[0].work.total / group[0].work.pixels / self._portions)
        count = max(1, min(count, portion))
        self._now += count * cost
        record_group(group, self._steps, self._turns, count)
        done = []
        for step in group:
            step.work.ticket.steps_done += count
            if not step.work.remaining:
                self._now += step.pace.fixed_seconds(self._load.seconds)
                self._steps.remove(step)
                self._turns.leave(step.work)
                self._starts.leave(step.work)
                done.append(step.work)
        return done


def _copy(work: Work) -> Work:
    ticket = NoSteps(steps_done=work.ticket.steps_done, steps_total=work.ticket.steps_total)
    return Work(
        caller=work.caller,
        priority=work.priority,
        pixels=work.pixels,
        steps=work.steps,
        ticket=ticket,
        number=work.number,
        pace=work.pace,
    )


def _step_of(work: Work) -> _Step:
    assert work.pace is not None  # noqa: S101 - looked at before
    return _Step(work, work.pace)


def _turns_of(works: Sequence[Work], given: Mapping[str, float]) -> Turns:
    turns = Turns(given)
    # Who has had the least first: one that enters is raised to the least of those that are there.
    for work in sorted(works, key=lambda work: given.get(work.caller, 0.0)):
        turns.enter(work)
    return turns
