"""One engine with its callers, and what it promises after each event."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.order import (
    Baton,
    Costs,
    Pace,
    Queue,
    Work,
    choose_group,
    note_urgency,
    record_group,
)
from bentoml_diffusers.engine.order.turns import AGED_SHARE, PATIENCE
from tools.simulation.actors import Broken, Job, Member, Slots, Stop, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable

REQUESTS = 100  # of a world


class World:
    """One engine with its callers.

    Args:
        seed: All that happens follows from it.
        requests: How many come.
    """

    overhead = 1.0

    def __init__(self, seed: int, requests: int = REQUESTS) -> None:
        self.random = rng = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.max_running, self.max_waiting = rng.choice((1, 2, 4, 8, 12)), rng.choice((4, 16, 60))
        self.queue: Queue[Member] = Queue(self.max_running, self.max_waiting, 10**9)
        self.baton: Baton[Member, Job] = Baton(self.choose, lambda: None)
        self.slots = Slots(rng.choice((1, 2, 4)))
        self.sleepers: list[Member] = []
        self.holders: list[Member] = []
        self.costs: dict[Hashable, Costs] = defaultdict(lambda: Costs(64))
        self.base_s, self.row_s = rng.choice(((0.0, 1.0), (1.0, 0.1), (3.0, 1.0)))
        self.oom_rows = rng.choice((10**6, 10**6, 6, 1))
        self.decisions = self.given = 0
        self.is_over = False
        self.inside: Counter[str] = Counter()
        self.unanswered = 0
        self.counts: Counter[str] = Counter()
        self.members = [self.draw(number) for number in range(requests)]
        moment, pace = 0.0, rng.choice((0.3, 2.0, 20.0))
        for member in self.members:
            moment += rng.expovariate(1 / pace)
            self.at(moment, lambda member=member: self.submit(member))  # type: ignore[misc]
            if rng.random() < 0.06:
                later = moment + rng.expovariate(1 / 20)
                self.at(later, lambda member=member: self.cancel(member))  # type: ignore[misc]

    def draw(self, name: int) -> Member:
        """Returns a request."""
        rng = self.random
        steps, size = rng.choice((1, 2, 3, 4, 8, 30)), rng.choice((1, 1, 1, 4))
        ticket = Ticket(self, None)
        work = Work(
            caller=rng.choice(("heavy", "heavy", "heavy", "light", f"guest {name}")),
            priority=rng.choice((0, 0, 0, 0, 1, -2)),
            pixels=size,
            steps=steps,
            ticket=ticket,
            number=name,
        )
        loras = frozenset(rng.sample(range(6), rng.choice((0, 0, 1, 1, self.slots.size))))
        return Member(
            name=name,
            ticket=ticket,
            work=work,
            alone=rng.random() < 0.03,
            loras=loras,
            size=size,
            rows=rng.choice((1, 2, 2)),
            load_s=rng.choice((0.0, 0.0, 0.5, 5.0)),
            is_corrupt=rng.random() < 0.02,
            dies_at=rng.randint(1, 8) if rng.random() < 0.02 else 0,
            previews=rng.choice((0, 0, 0, 2)),
        )

    # -- what a request does; each yield is where its thread waits

    def live(self, member: Member) -> Generator[tuple[Any, ...], None, None]:
        """The life of a request, as a worker's thread runs it."""
        yield "sleep", member.load_s
        member.ticket.check()
        if member.is_corrupt:
            raise Stop("corrupt")
        while True:
            yield ("enter",)
            try:
                member.ticket.check()
                if self.slots.acquire(member.loras):
                    try:
                        yield from self.generate(member)
                        return
                    finally:
                        self.release(member)
            finally:
                self.leave(member)
            member.ticket.check()
            yield ("release",)
            member.ticket.check()

    def generate(self, member: Member) -> Generator[tuple[Any, ...], None, None]:
        """Runs the pipeline."""
        yield "call", "encoder", 1, False
        for step in range(1, member.work.steps + 1):
            member.ticket.check()
            yield "call", ("unet", member.size), member.rows, True
            member.ticket.steps_done += 1
            member.ticket.steps_total = member.work.steps
            if step == member.dies_at:
                raise Stop("died")
            if member.previews and step % member.previews == 0:
                yield "call", ("decoder", member.size), 1, False
        yield "call", ("decoder", member.size), 1, False

    def release(self, member: Member) -> None:
        """Gives slots up, and wakes who waits for them."""
        if self.is_over:
            return
        self.slots.release(member.loras)
        waiting, self.sleepers = self.sleepers, []
        for one in waiting:
            self.at(self.now, lambda one=one: self.resume(one))  # type: ignore[misc]

    # -- what carries the decisions out

    def at(self, moment: float, function: Callable[[], None]) -> None:
        """Lets something happen."""
        heapq.heappush(self.events, (moment, next(self.numbers), function))

    def submit(self, member: Member) -> None:
        """A request comes."""
        rng = self.random
        if rng.random() < 0.3:
            member.ticket.deadline = member.work.deadline = self.now + rng.expovariate(1 / 60)
            member.work.pace = Pace(("unet", member.size), member.rows, 1.0)
        if not self.queue.has_room(member.work):
            member.answer = "refused"
            self.counts["refused"] += 1
            return
        self.unanswered += 1
        self.queue.add(member.work, member)
        if member.ticket.deadline is not None:
            self.at(member.ticket.deadline + 1e-6, self.drop_late)
        self.start()

    def drop_late(self) -> None:
        """Those whose time is over while they wait are answered."""
        for member in [one for one in self.queue.waiting.values() if one.ticket.must_stop]:
            self.queue.withdraw(member.work)
            self.finish(member, "late")
        for member in [one for one in self.sleepers if one.ticket.must_stop]:
            self.sleepers.remove(member)
            self.resume(member)

    def cancel(self, member: Member) -> None:
        """The caller goes away."""
        member.ticket.is_cancelled = True
        if self.queue.withdraw(member.work):
            self.finish(member, "cancelled")

    def start(self) -> None:
        """Starts who may."""
        while (member := self.queue.start_next()) is not None:
            member.thread = self.live(member)
            self.resume(member)

    def finish(self, member: Member, answer: str) -> None:
        """Answers a request."""
        if member.answer is not None:
            raise Broken(f"request {member.name} is answered twice")
        member.answer = answer
        self.counts[answer] += 1
        self.unanswered -= 1
        self.queue.finish(member.work)
        self.start()

    def resume(self, member: Member) -> None:
        """Lets a thread go on until it waits."""
        error = member.job.error if member.job else None
        member.job = None
        assert member.thread is not None
        try:
            what = member.thread.throw(error) if error else next(member.thread)
        except StopIteration:
            self.finish(member, "done")
        except Stop as err:
            self.finish(member, str(err))
        else:
            self.wait(member, *what)

    def wait(self, member: Member, what: str, *details: Any) -> None:
        """What a thread waits for."""
        if what == "sleep":
            self.at(self.now + details[0], lambda: self.resume(member))
        elif what == "release":
            self.sleepers.append(member)
        elif what == "enter":
            member.since, member.callers, member.aged_at = self.given, 0, None
            self.inside[member.work.caller] += 1
            if self.baton.enter(member):
                self.pass_on()
        else:
            member.job = Job(member, *details)
            self.call(member, member.job)

    def call(self, member: Member, job: Job) -> None:
        """A forward: at once if the request is alone, else by the baton."""
        if self.baton.live == 1 and not self.baton.entering:
            self.perform(member, [job])
            return
        self.holders.remove(member)
        self.baton.call(job)
        self.pass_on()

    def leave(self, member: Member) -> None:
        """A request gives the baton back for good, or until there is a slot."""
        if self.is_over:
            return
        self.holders.remove(member)
        self.inside[member.work.caller] -= 1
        self.baton.leave(member)
        self.pass_on()

    def pass_on(self) -> None:
        """Wakes whose turn it is."""
        member = self.baton.pass_on()
        if member is None:
            return
        self.holders.append(member)
        if len(self.holders) > 1:
            raise Broken(f"{len(self.holders)} requests hold the baton")
        jobs, member.task = member.task, None
        if jobs is None:
            self.at(self.now, lambda: self.resume(member))
        else:
            self.perform(member, jobs)

    def perform(self, member: Member, jobs: list[Job]) -> None:
        """Runs a group, which takes its time."""
        rows = sum(job.rows for job in jobs)
        kind, scale = jobs[0].kind, jobs[0].member.size if jobs[0].kind != "encoder" else 0.1
        seconds = scale * (self.base_s + self.row_s * rows)
        if rows > self.oom_rows:
            self.costs[kind].max_rows = max(1, rows // 2)
            seconds *= 2
            for job in jobs:
                if job.rows > self.oom_rows:
                    job.error = Stop("out of memory")
        else:
            self.costs[kind].record(rows, seconds)
        self.at(self.now + seconds, lambda: self.share(member, jobs))

    def share(self, member: Member, jobs: list[Job]) -> None:
        """The group is done."""
        self.baton.share(jobs)
        self.resume(member)

    def seconds(self, kind: Hashable, rows: int) -> float | None:
        """As the profile's."""
        return self.costs[kind].seconds(rows)

    def choose(self, waiting: list[Job]) -> list[Job]:
        """As the conductor's."""
        note_urgency([job.work for job in waiting], self.now, self)
        turns = self.baton.turns
        chosen = choose_group(
            waiting, turns, lambda kind, *rows: self.costs[kind].choose_rows(*rows)
        )
        record_group(chosen, waiting, turns)
        self.given += sum(job.work.pixels for job in chosen)
        self.note_aged(waiting)
        return chosen

    # -- the promises

    def note_aged(self, waiting: list[Job]) -> None:
        """Counts the decisions from when on a request must be aged; by books of its own."""
        self.decisions += 1
        callers = len(+self.inside)
        for member in (job.member for job in waiting):
            member.callers = max(member.callers, callers)
            fair = member.work.total * member.callers / member.work.weight
            if member.aged_at is None and self.given - member.since > PATIENCE * fair:
                older = (one.work for one in self.members if one.answer is None)
                number = member.work.number
                calls = sum(2 * work.steps + 4 for work in older if work.number <= number)
                member.aged_at, member.allowed = self.decisions, AGED_SHARE * calls
            elif member.aged_at and self.decisions - member.aged_at > member.allowed:
                raise Broken(f"request {member.name} starves")

    def check(self) -> None:
        """Raises if a promise is not kept."""
        if len(self.queue.waiting) > self.max_waiting or len(self.queue.running) > self.max_running:
            raise Broken("more requests wait or run than may")
        if self.baton.is_held != bool(self.holders):
            raise Broken("the baton is held by nobody, or by one that does not know")
        if self.baton.alone is not None and self.baton.live > 1 + self.count_stopped():
            raise Broken("a request that must be alone is not")

    def count_stopped(self) -> int:
        """Those that are let in to find out that they must stop."""
        return sum(
            1
            for one in self.queue.running.values()
            if one.ticket.must_stop and one is not self.baton.alone
        )

    def check_end(self) -> None:
        """Raises if something is left."""
        lost = [one.name for one in self.members if one.answer is None]
        if lost or self.unanswered:
            raise Broken(f"requests {lost} are lost")
        if any(self.slots.held.values()):
            raise Broken("slots are held by nobody")
        turns = self.baton.turns
        left = (self.queue.waiting, self.queue.running, self.baton.live, self.baton.waiting)
        if any(left) or turns.all_given() or self.queue.turns.all_given():
            raise Broken("what is done has left something behind")

    def run(self) -> Counter[str]:
        """Lets all happen; returns how many requests ended how.

        Raises:
            Broken: A promise was not kept.
        """
        try:
            while self.events:
                self.now, _, function = heapq.heappop(self.events)
                function()
                self.check()
            self.check_end()
        finally:
            self.close()
        return self.counts

    def close(self) -> None:
        """Ends the threads that a broken promise has left; what they do then does not count."""
        self.is_over = True
        for member in self.members:
            if member.thread is not None:
                member.thread.close()


def run_world(seed: int, requests: int = REQUESTS) -> Counter[str]:
    """Runs one world.

    Raises:
        Broken: With the seed in its text.
    """
    try:
        return World(seed, requests).run()
    except Exception as err:
        text = str(err) if isinstance(err, Broken) else type(err).__name__
        raise Broken(f"seed {seed}: {text}") from err


def run_worlds(seeds: range) -> Counter[str]:
    """Runs worlds one after another; returns how many requests ended how."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        counts += run_world(seed)
    return counts
