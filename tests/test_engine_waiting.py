"""Who waits for something of the engine can stop, and is not stopped by another engine."""

import pytest
from holding import Gate

from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.engine.once import Once
from bentoml_diffusers.engine.requests.request import Ticket

CALL = {"prompt": "a red circle", "num_inference_steps": 2}


@pytest.fixture
def busy():
    """An engine that runs an exclusive request until the test is over."""
    gate = Gate()
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        engine.submit("txt2img", **CALL, exclusive=True, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        yield engine
        gate.opened.set()


@pytest.fixture(scope="module")
def workflow():
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        return engine.run("txt2img", **CALL, return_workflow=True).workflow


def test_a_recorded_request_is_cancelled_while_it_waits_for_its_turn(busy):
    waiting = busy.submit("txt2img", **CALL, return_workflow=True)
    waiting.cancel()
    with pytest.raises(errors.RequestCancelled):
        waiting.result(30)


def test_a_recorded_request_is_late_while_it_waits_for_its_turn(busy):
    with pytest.raises(errors.DeadlineExceeded):
        busy.submit("txt2img", **CALL, return_workflow=True, timeout_s=0.2).result(30)


def test_a_replay_is_late_while_it_waits_to_be_compared(busy, workflow):
    with pytest.raises(errors.DeadlineExceeded):
        busy.submit_replay(workflow, timeout_s=0.2).result(30)


def test_one_engine_records_while_another_waits(busy):
    busy.submit("txt2img", **CALL, return_workflow=True)
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        handle = engine.submit("txt2img", **CALL, return_workflow=True)
        assert handle.result(30).workflow is not None


def test_what_failed_is_computed_again():
    outcomes = iter([ValueError("on purpose"), 5])

    def compute():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    once = Once(compute)
    with pytest.raises(ValueError, match="on purpose"):
        once.get(Ticket())
    assert [once.get(Ticket()) for _ in range(2)] == [5, 5]
