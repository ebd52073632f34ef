"""Who starts, and whose forward runs next: functions of a state that they do not change."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bentoml_diffusers.engine.order.turns import Turns
    from bentoml_diffusers.engine.order.work import ChooseRows, Forward, Work

F = TypeVar("F", bound="Forward")

# A request that is this many times smaller than what its caller has running may take a kept place.
_SMALL = 4


def kept_places(places: int) -> int:
    """Returns how many places are kept for small requests, and for callers with none."""
    return 0 if places < 4 else max(1, places // 8)


def choose_start(
    waiting: Sequence[Work], running: Iterable[Work], places: int, turns: Turns
) -> Work | None:
    """Returns who of those that wait starts now; ``None``: nobody.

    Args:
        waiting: In the order in which they came.
        running: Those that have started.
        places: How many may run at once.
        turns: What callers have been given, each request counted when it started.
    """
    smallest: dict[str, int] = {}
    count = 0
    for work in running:
        count += 1
        left = work.remaining
        smallest[work.caller] = min(left, smallest.get(work.caller, left))
    if count >= places:
        return None
    if places - count <= kept_places(places):
        waiting = [
            work
            for work in waiting
            if work.caller not in smallest or work.total * _SMALL <= smallest[work.caller]
        ]
    return choose_entry(waiting, turns)


def choose_entry(waiting: Sequence[Work], turns: Turns) -> Work | None:
    """Returns who goes first; ``None`` if nobody waits."""
    if not waiting:
        return None
    owed = find_aged(waiting, turns) if turns.owes else None
    if owed is not None:
        return owed
    caller = min((work.caller for work in waiting), key=turns.place)
    return min((work for work in waiting if work.caller == caller), key=rank)


def choose_group(forwards: Sequence[F], turns: Turns, choose_rows: ChooseRows) -> list[F]:
    """Returns the forwards that run together next; at least one.

    Args:
        forwards: All that wait, in the order in which they came.
        turns: What callers have been given, each forward counted when it ran.
        choose_rows: How many rows are worth their time.
    """
    first = choose_first(forwards, turns)
    key, caller = first.key, first.work.caller
    mates = [one for one in forwards if one.key == key]
    if len(mates) == 1:
        return mates
    own = sum(one.rows for one in mates if one.work.caller == caller)
    waiting = sum(one.rows for one in mates)
    stretch = _weigh(forwards) / first.work.weight if own < waiting else 1.0
    limit = min(choose_rows(first.kind, waiting, own, stretch), first.max_rows)
    chosen, rows = [first], first.rows
    mates.remove(first)
    for one in sorted(mates, key=lambda one: rank(one.work)):
        if rows + one.rows <= limit:
            chosen.append(one)
            rows += one.rows
    return chosen


def choose_first(forwards: Sequence[F], turns: Turns) -> F:
    """Returns the forward that the next group is made for.

    A caller goes on with its smallest request, ahead of other callers' larger ones, until it is
    ahead of one of them by the work of that request. What comes before and after the steps goes
    first, of the caller that has had the least: so what has just come shares the next step.
    """
    owed = find_aged([one.work for one in forwards], turns) if turns.owes else None
    if owed is not None:
        return next(one for one in forwards if one.work is owed)
    by_caller: dict[str, list[F]] = defaultdict(list)
    for one in forwards:
        by_caller[one.work.caller].append(one)
    given = {caller: turns.given(caller) for caller in by_caller}
    least = min(given.values())
    firsts = []
    for caller, mine in by_caller.items():
        asides = [one for one in mine if not one.is_step] if given[caller] <= least else []
        if asides:
            return min(asides, key=lambda one: rank(one.work))
        first = min(mine, key=lambda one: rank(one.work))
        lead = given[caller] - least
        if not lead or lead < first.work.total / first.work.weight:
            firsts.append(first)
    return min(firsts, key=lambda one: rank(one.work))


def record_group(
    chosen: Sequence[Forward], forwards: Sequence[Forward], turns: Turns, count: int = 1
) -> None:
    """Notes in the turns what a group has been given.

    Args:
        chosen: The group.
        forwards: All that waited, the group among them.
        turns: Is changed.
        count: How many such forwards it has been given.
    """
    if len(chosen) < len(forwards):
        aged = find_aged([one.work for one in forwards], turns)
        if aged is not None:
            turns.note_aged(was_passed=all(one.work is not aged for one in chosen))
    for one in chosen:
        turns.charge(one.work, count * one.work.pixels)


def rank(work: Work) -> tuple[bool, int, int, int]:
    """Urgent first, then by priority, the shortest remaining work, who came first."""
    return not work.is_urgent, -work.priority, work.remaining, work.number


def find_aged(works: Iterable[Work], turns: Turns) -> Work | None:
    """Returns the oldest request that is aged, if there is one."""
    aged = [work for work in works if turns.is_aged(work)]
    return min(aged, key=lambda work: work.number) if aged else None


def _weigh(forwards: Sequence[Forward]) -> float:
    """Returns the weights of all callers that wait, each by its most urgent request."""
    weights: dict[str, float] = {}
    for one in forwards:
        weights[one.work.caller] = max(one.work.weight, weights.get(one.work.caller, 0.0))
    return sum(weights.values())
