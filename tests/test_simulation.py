"""The order of work in random worlds, and that faults which are put in are found."""

import pytest

from bentoml_diffusers.engine.order import Baton, Queue
from bentoml_diffusers.engine.order.turns import Turns
from tools import simulation


def test_promises_are_kept_in_random_worlds():
    counts = simulation.run_worlds(range(40))
    assert counts.total() == 40 * simulation.REQUESTS
    assert counts["done"] > 1000
    assert set(counts) > {"refused", "late", "cancelled", "corrupt", "died"}


def test_a_seed_repeats_a_world():
    assert simulation.run_world(7) == simulation.run_world(7)


def forget_one(baton, jobs):
    baton.ready.extend(job.member for job in jobs[2:])


def ignore_who_is_alone(baton):
    while baton.entering:
        member = baton.entering.popleft()
        baton.alone = member if member.alone else baton.alone
        baton.live += 1
        baton.ready.append(member)


def leave_the_turns(queue, work):
    queue.running.pop(work, None)


def keep_when_it_dies(world, member):
    if world.is_over:
        return
    if member.ticket.steps_done != member.dies_at:
        world.slots.release(member.loras)
    waiting, world.sleepers = world.sleepers, []
    for one in waiting:
        world.at(world.now, lambda one=one: world.resume(one))


FAULTS = {
    "a request of a group is forgotten": (Baton, "share", forget_one, "lost"),
    "a cancelled request that runs is answered": (
        *(Queue, "withdraw", lambda queue, work: work in queue.running or work in queue.waiting),
        "twice|KeyError",
    ),
    "the baton is given to each who comes": (
        *(Baton, "enter", lambda baton, member: baton_enter(baton, member) or True),
        "hold the baton",
    ),
    "who must be alone is not": (Baton, "_admit", ignore_who_is_alone, "alone"),
    "a queue without an end": (Queue, "has_room", lambda queue, work: True, "more requests wait"),
    "no turn for the aged": (Turns, "owes", False, "starves"),
    "all that callers have been given is kept": (Queue, "finish", leave_the_turns, "behind"),
    "slots are kept by who dies": (simulation.World, "release", keep_when_it_dies, "lost|slots"),
}
baton_enter = Baton.enter


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_seed_repeats_it(name, monkeypatch):
    owner, attribute, fault, said = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(simulation.Broken, match=said) as found:
        simulation.run_worlds(range(300))
    seed = int(str(found.value).split()[1].rstrip(":"))
    with pytest.raises(simulation.Broken) as again:
        simulation.run_world(seed)
    assert str(again.value) == str(found.value)
