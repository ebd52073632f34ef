"""The order of work, without an engine: who starts, and whose forward runs next."""

from dataclasses import dataclass, field

import pytest

from bentoml_diffusers.engine.order.costs import ENOUGH, Costs, bucket
from bentoml_diffusers.engine.order.policy import (
    choose_group,
    choose_start,
    kept_places,
    record_group,
)
from bentoml_diffusers.engine.order.turns import AGED_SHARE, PATIENCE, Turns
from bentoml_diffusers.engine.order.work import NoSteps, Work


@dataclass(eq=False)
class Forward:
    work: Work
    key: str = "unet"
    rows: int = 2
    is_step: bool = True
    max_rows: int = 64

    @property
    def kind(self):
        return self.key


def make_work(steps, caller="", **more):
    return Work(caller=caller, pixels=1, steps=steps, ticket=NoSteps(steps_total=None), **more)


@dataclass
class Device:
    """Runs forwards in the order of the policy, one row at a time or all at once."""

    rows: int
    turns: Turns = field(default_factory=Turns)
    waiting: list = field(default_factory=list)
    done: dict = field(default_factory=dict)
    forwards: int = 0

    def add(self, *works):
        for work in works:
            self.turns.enter(work)
            self.waiting.append(Forward(work))

    def run(self, count=10**6):
        while self.waiting and count:
            count -= 1
            self.forwards += 1
            group = choose_group(self.waiting, self.turns, lambda *_: self.rows)
            record_group(group, self.waiting, self.turns)
            for one in group:
                one.work.ticket.steps_done += 1
                if not one.work.remaining:
                    self.waiting.remove(one)
                    self.turns.leave(one.work)
                    self.done[one.work] = self.forwards


def test_the_smallest_goes_first_and_is_not_interrupted_by_a_larger_one():
    device = Device(rows=1)
    large, small, late = make_work(10), make_work(3), make_work(2)
    device.add(large, small)
    device.run(2)
    device.add(late)
    device.run()
    assert device.done == {small: 3, late: 5, large: 15}


def test_a_late_small_request_waits_for_the_forward_that_runs():
    device = Device(rows=1)
    device.add(make_work(100))
    device.run(20)
    late = make_work(2)
    device.add(late)
    device.run(2)
    assert late in device.done


def test_small_ones_that_keep_coming_do_not_starve_a_large_one():
    device = Device(rows=1)
    large = make_work(20)
    device.add(large)
    for _ in range(1000):
        device.add(make_work(2))
        device.run(2)
        if large in device.done:
            break
    assert device.done[large] <= (PATIENCE + AGED_SHARE + 1) * 20


def test_a_light_caller_beside_a_heavy_one_takes_at_most_twice_its_time_and_a_forward():
    """Again and again: also when it asks for the next as soon as one is done."""
    device = Device(rows=1)
    device.add(*(make_work(150, "heavy") for _ in range(28)))
    device.run(7)
    for _ in range(200):
        light, before = make_work(4, "light"), device.forwards
        device.add(light)
        while light not in device.done:
            device.run(1)
        assert device.forwards - before <= 2 * 4 + 1
    heavy = device.turns.given("heavy")
    assert heavy >= 0.4 * device.forwards


def test_callers_with_one_request_each_are_served_one_after_the_other():
    """Side by side, all would be as late as the last."""
    device = Device(rows=1)
    works = [make_work(10, f"caller {number}") for number in range(5)]
    device.add(*works)
    device.run()
    assert sorted(device.done.values()) == [10, 20, 30, 40, 50]


def test_two_heavy_callers_get_the_same():
    device = Device(rows=1)
    device.add(*(make_work(10, "many") for _ in range(30)))
    device.add(*(make_work(30, "few") for _ in range(10)))
    device.run(300)
    assert abs(device.turns.given("many") - device.turns.given("few")) <= 30 + 1


@pytest.mark.parametrize(("priority", "share"), [(0, 1 / 2), (1, 2 / 3), (3, 8 / 9), (-1, 1 / 3)])
def test_a_level_of_priority_doubles_the_share(priority, share):
    device = Device(rows=1)
    mine = [make_work(10, "mine", priority=priority) for _ in range(200)]
    device.add(*mine, *(make_work(10, "other") for _ in range(200)))
    device.run(900)
    done = sum(work.ticket.steps_done for work in mine)
    assert done / 900 == pytest.approx(share, abs=0.03)


def test_a_higher_priority_goes_first_within_a_caller():
    device = Device(rows=1)
    small, urgent = make_work(2), make_work(9, priority=1)
    device.add(small, urgent)
    device.run()
    assert device.done == {urgent: 9, small: 11}


def test_time_without_requests_gives_no_credit():
    turns = Turns()
    busy, late = make_work(1, "busy"), make_work(1, "late")
    turns.enter(busy)
    turns.charge(busy, 1000)
    turns.enter(late)
    assert turns.given("late") == 1000
    turns.leave(late)
    turns.charge(busy, 10)
    turns.enter(late)
    assert turns.given("late") == 1010


def test_what_callers_had_is_forgotten_when_it_says_nothing_any_more():
    turns = Turns()
    for number in range(1000):
        work = make_work(1, f"caller {number}")
        turns.enter(work)
        turns.charge(work, 1)
        turns.leave(work)
    assert not turns._given
    assert not turns._since


def test_a_forward_is_shared_by_all_callers_but_not_longer_than_their_turns_allow():
    turns, asked = Turns(), []
    light, heavy = make_work(4, "light"), [make_work(9, "heavy") for _ in range(9)]
    for work in (light, *heavy):
        turns.enter(work)

    def choose_rows(kind, waiting, own, stretch):
        asked.append((kind, waiting, own, stretch))
        return own * stretch

    group = choose_group([Forward(work) for work in (light, *heavy)], turns, choose_rows)
    assert asked == [("unet", 20, 2, 2.0)]
    assert [one.work for one in group] == [light, heavy[0]]


def test_what_comes_before_the_steps_goes_first():
    device = Device(rows=64)
    device.add(*(make_work(5) for _ in range(3)))
    new = make_work(50)
    device.turns.enter(new)
    encoding = Forward(new, "text_encoder", is_step=False)
    assert choose_group([*device.waiting, encoding], device.turns, lambda *_: 64) == [encoding]


def test_but_a_caller_that_is_ahead_does_not_hold_others_up_with_it():
    turns = Turns()
    heavy, light = [make_work(50, "heavy") for _ in range(9)], make_work(4, "light")
    for work in (light, *heavy):
        turns.enter(work)
    turns.charge(heavy[0], 2)
    decodings = [Forward(work, f"vae {n}", is_step=False) for n, work in enumerate(heavy)]
    [first] = choose_group([*decodings, Forward(light)], turns, lambda *_: 64)
    assert first.work is light


class TestPlaces:
    def start_all(self, waiting, running, places, turns):
        started = []
        while (work := choose_start(waiting, running, places, turns)) is not None:
            waiting.remove(work)
            running.append(work)
            turns.charge(work, work.total)
            started.append(work)
        return started

    def test_some_are_kept_for_callers_that_have_none(self):
        turns, running = Turns(), []
        waiting = [make_work(150, "heavy") for _ in range(40)]
        for work in waiting:
            turns.enter(work)
        assert len(self.start_all(waiting, running, 32, turns)) == 32 - kept_places(32) == 28
        light = make_work(4, "light")
        turns.enter(light)
        waiting.append(light)
        assert self.start_all(waiting, running, 32, turns) == [light]

    def test_and_for_what_is_much_smaller(self):
        turns, running = Turns(), []
        waiting = [make_work(150) for _ in range(10)]
        for work in waiting:
            turns.enter(work)
        assert len(self.start_all(waiting, running, 8, turns)) == 7
        small = make_work(4)
        turns.enter(small)
        assert self.start_all([*waiting, small], running, 8, turns) == [small]

    @pytest.mark.parametrize("places", [1, 2, 3])
    def test_none_where_there_are_few(self, places):
        turns = Turns()
        waiting = [make_work(150) for _ in range(10)]
        for work in waiting:
            turns.enter(work)
        assert len(self.start_all(waiting, [], places, turns)) == places

    def test_callers_start_in_turn(self):
        turns = Turns()
        waiting = [make_work(10, "heavy") for _ in range(5)]
        waiting += [make_work(10, "other") for _ in range(2)]
        for work in waiting:
            turns.enter(work)
        callers = [work.caller for work in self.start_all(waiting, [], 3, turns)]
        assert callers == ["heavy", "other", "heavy"]


def spend(costs, **seconds):
    for name, value in seconds.items():
        rows = int(name.removeprefix("rows_"))
        for _ in range(ENOUGH):
            costs.record(rows, value * rows)


class TestCosts:
    def test_batches_grow_while_a_row_gets_much_cheaper(self):
        costs = Costs(64)
        spend(costs, rows_16=1.0)
        assert costs.choose(16) == 8  # tries the half before it believes
        spend(costs, rows_8=1.5)
        assert costs.choose(16) == 16

    def test_batches_shrink_where_a_row_costs_the_same(self):
        costs = Costs(64)
        spend(costs, rows_16=1.0, rows_8=1.0, rows_4=1.0, rows_2=1.0)
        assert costs.choose(16) == 1
        spend(costs, rows_1=1.0)
        assert costs.choose(16) == 1

    def test_a_gain_that_makes_all_late_is_left(self):
        """Measured: a UNet of 135 M at 32x32 latents on one thread."""
        costs = Costs(64)
        spend(costs, rows_1=0.312, rows_2=0.288, rows_4=0.272, rows_8=0.261, rows_16=0.268)
        assert [costs.choose(rows) for rows in (16, 8, 4)] == [4, 4, 2]

    def test_a_gain_that_is_worth_it_is_taken(self):
        """Measured: one of 2.8 M at 8x8 latents."""
        costs = Costs(64)
        spend(costs, rows_1=6.21, rows_2=4.42, rows_4=2.78, rows_8=1.93, rows_16=1.56)
        spend(costs, rows_32=1.3, rows_64=1.2)
        assert [costs.choose(rows) for rows in (64, 48, 32, 16, 8, 4, 2)] == [
            64,
            64,
            32,
            16,
            8,
            4,
            2,
        ]

    def test_a_forward_is_as_long_as_it_may_be(self):
        costs = Costs(64)
        assert costs.choose_within(2, 2.0) == 4  # nothing is known
        spend(costs, rows_2=4.4, rows_4=2.8, rows_8=1.9)
        assert costs.choose_within(2, 1.5) == 4
        assert costs.choose_within(2, 2.0) == 8

    def test_seconds_of_a_size_that_was_not_measured(self):
        costs = Costs(64)
        assert costs.seconds(4) is None
        spend(costs, rows_2=1.0)
        assert costs.seconds(4) == 4.0
        assert costs.seconds(2) == 2.0

    def test_buckets_are_powers_of_two(self):
        assert [bucket(rows) for rows in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
