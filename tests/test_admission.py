"""The queue: who runs, who waits, who is refused, what it costs to be late."""

import asyncio
import itertools

import pytest
from holding import Gate, held

from bentoml_diffusers import Engine, EngineLimits, RequestOptions, _names, errors, testing
from bentoml_diffusers.engine.forwards.profile import CostProfile
from bentoml_diffusers.engine.order import Estimate
from bentoml_diffusers.engine.requests.request import Ticket
from bentoml_diffusers.serving import refusals
from bentoml_diffusers.serving.jobs import JobsFull

CALL = {"prompt": "a red circle", "num_inference_steps": 2}


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def engine_with(**limits):
    return Engine.from_model(testing.tiny_stable_diffusion(), limits=EngineLimits(**limits))


def test_beyond_the_queue_is_refused_and_told_when_to_come_again(gate):
    with engine_with(max_running=1, max_queue=2) as engine:
        running = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        waiting = [engine.submit("txt2img", **CALL) for _ in range(2)]
        with pytest.raises(errors.QueueFull) as caught:
            engine.submit("txt2img", **CALL)
        assert caught.value.error_code == 429
        assert 1 <= caught.value.retry_after_s <= 600
        assert engine.report().counts["refused"] == 1
        gate.opened.set()
        assert all(handle.result(30).images for handle in [running, *waiting])


def test_waiting_work_is_bounded_in_pixel_steps(gate):
    work = 32 * 32 * 2
    with engine_with(max_running=1, max_pixel_steps=2 * work) as engine:
        engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        first = engine.submit("txt2img", **CALL)
        with pytest.raises(errors.QueueFull):
            engine.submit("txt2img", **{**CALL, "num_inference_steps": 10})
        second = engine.submit("txt2img", **CALL)
        gate.opened.set()
        assert first.result(30).images
        assert second.result(30).images


def test_callers_start_in_turn_and_their_smallest_request_first(gate):
    started = []
    with engine_with(max_running=1) as engine:
        engine.submit("txt2img", **CALL, callback_on_step_end=gate, caller="heavy")
        assert gate.reached.wait(30)
        for caller, steps in [("heavy", 3), ("heavy", 2), ("light", 2)]:
            call = {**CALL, "num_inference_steps": steps, "caller": caller}
            handle = engine.submit("txt2img", **call)
            name = (caller, steps)
            handle.future.add_done_callback(lambda _, name=name: started.append(name))
        gate.opened.set()
    assert started == [("light", 2), ("heavy", 2), ("heavy", 3)]


def test_a_backlog_leaves_room_in_the_queue_for_other_callers(gate):
    with engine_with(max_running=1, max_queue=4, max_pixel_steps=3 * 32 * 32 * 2) as engine:
        engine.submit("txt2img", **CALL, callback_on_step_end=gate, caller="heavy")
        assert gate.reached.wait(30)
        for _ in range(3):
            engine.submit("txt2img", **CALL, caller="heavy")
        with pytest.raises(errors.QueueFull):
            engine.submit("txt2img", **CALL, caller="heavy")
        light = engine.submit("txt2img", **CALL, caller="light")
        with pytest.raises(errors.QueueFull):
            engine.submit("txt2img", **CALL, caller="third")
        gate.opened.set()
        assert light.result(30).images


@pytest.mark.parametrize(
    ("name", "value"), [("caller", 3), ("caller", None), ("priority", 9), ("priority", True)]
)
def test_what_cannot_be_a_caller_or_a_priority(name, value):
    with pytest.raises(errors.InvalidRequest, match=name):
        RequestOptions(**{name: value})


def test_a_request_knows_its_place_and_its_end_once_one_like_it_was_done(gate):
    with engine_with(max_running=1) as engine:
        for _ in range(3):
            engine.run("txt2img", **CALL)
        running = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        first = engine.submit("txt2img", **{**CALL, "num_inference_steps": 20})
        second = engine.submit("txt2img", **{**CALL, "num_inference_steps": 40})
        estimates = [handle.estimate for handle in (running, first, second)]
        assert [one.position for one in estimates] == [0, 1, 2]
        assert estimates[0].start_s == 0
        for before, after in itertools.pairwise(estimates):
            assert before.finish_s == pytest.approx(after.start_s)
            assert after.start_s < after.finish_s
        other = engine.submit("txt2img", **CALL, height=40, width=40)  # of which none was done yet
        assert other.estimate == Estimate(3)
        gate.opened.set()
        assert other.result(30).images
        assert other.estimate == Estimate(0, 0.0, 0.0)


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(gate):
    """Not before it is known what such a request costs."""
    long, many = {**CALL, "num_inference_steps": 500}, {**CALL, "num_inference_steps": 900}
    with engine_with(max_running=1) as engine:
        engine.submit("txt2img", **long, timeout_s=0.01).cancel()
        for _ in range(3):
            engine.run("txt2img", **CALL)
        with pytest.raises(errors.DeadlineExceeded, match="fewer steps"):
            engine.submit("txt2img", **long, timeout_s=0.01)
        running = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        waiting = [engine.submit("txt2img", **many) for _ in range(20)]
        time_for_three = {"num_inference_steps": 950, "timeout_s": 3 * waiting[0].estimate.finish_s}
        with pytest.raises(errors.DeadlineUnreachable, match="try again in") as behind:
            engine.submit("txt2img", **{**many, **time_for_three})
        assert behind.value.retry_after_s >= 1
        assert engine.report().counts["refused"] == 1
        for handle in waiting:
            handle.cancel()
        gate.opened.set()
        assert running.result(30).images


def test_a_cancelled_request_frees_its_place_at_once(gate):
    with engine_with(max_running=1, max_queue=1) as engine:
        engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        waiting = engine.submit("txt2img", **CALL)
        waiting.cancel()
        with pytest.raises(errors.RequestCancelled):
            waiting.result(1)
        other = engine.submit("txt2img", **CALL)
        gate.opened.set()
        assert other.result(30).images


def test_a_deadline_passes_in_the_queue_while_another_request_runs(gate):
    with engine_with(max_running=1) as engine:
        engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        late = engine.submit("txt2img", **CALL, timeout_s=0.05)
        with pytest.raises(errors.DeadlineExceeded):
            late.result(5)
        assert engine.report().waiting == 0
        gate.opened.set()
    assert engine.report().counts["expired"] == 1


def test_each_error_has_one_outcome_in_all_counts():
    """The engine and the metrics of a service ask the error."""
    classes = [errors.DiffusersError]
    for cls in classes:
        classes += cls.__subclasses__()
    outcomes = {cls.__name__: (cls.error_code, cls.outcome) for cls in classes}
    special = {
        "QueueFull": (429, "refused"),
        "AdaptersBusy": (503, "refused"),
        refusals.UploadsFull.__name__: (503, "refused"),
        refusals.QuotaExceeded.__name__: (429, "refused"),
        "DeadlineUnreachable": (503, "refused"),
        JobsFull.__name__: (429, "refused"),
        "RequestCancelled": (503, "cancelled"),
        "DeadlineExceeded": (504, "expired"),
    }
    assert special.items() <= outcomes.items()
    for name, (status, outcome) in outcomes.items():
        if name not in special:
            assert outcome == ("invalid" if status < 500 else "failed"), name


def test_outcomes_are_counted_wherever_a_request_ends(gate, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")

    def fail(*_):
        raise RuntimeError("on purpose")

    limits = EngineLimits(max_running=1, max_queue=1)
    with Engine.from_model(
        testing.tiny_stable_diffusion(), limits=limits, lora_dir=str(tmp_path)
    ) as engine:
        assert engine.run("txt2img", **CALL).images
        for wrong, error in [
            ({"prompt": 3}, errors.InvalidRequest),
            ({"lora_weights": "missing"}, errors.AdapterNotFound),
            ({"lora_weights": "broken.safetensors"}, errors.InvalidModel),
            ({"callback_on_step_end": fail}, errors.PipelineFailed),
            ({"timeout_s": 1e-9}, errors.DeadlineExceeded),
        ]:
            with pytest.raises(error):
                engine.run("txt2img", **{**CALL, **wrong})
        running = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
        assert gate.reached.wait(30)
        waiting = engine.submit("txt2img", **CALL)
        with pytest.raises(errors.QueueFull):
            engine.submit("txt2img", **CALL)
        running.cancel()
        waiting.cancel()
        gate.opened.set()
    counts = dict(engine.report().counts)
    assert counts.pop("submitted") == 6
    expected = {"done": 1, "invalid": 3, "failed": 1, "expired": 1, "refused": 1, "cancelled": 2}
    assert counts == expected


def test_a_request_that_gives_no_deadline_has_that_of_the_engine():
    with engine_with(timeout_s=1e-9) as engine:
        for call in (engine.run, lambda *args, **given: asyncio.run(engine.arun(*args, **given))):
            with pytest.raises(errors.DeadlineExceeded):
                call("txt2img", **CALL)
        assert engine.run("txt2img", **CALL, timeout_s=60).images


def test_a_request_that_is_late_and_then_cancelled_was_late():
    ticket = Ticket(timeout_s=-1.0)
    ticket.cancel()
    with pytest.raises(errors.DeadlineExceeded):
        ticket.check()


def test_steps_are_told_to_who_asks_also_of_a_request_that_fails():
    steps = []

    def fail_second(pipeline, index, timestep, tensors):
        assert index == 0
        return tensors

    with engine_with() as engine:
        assert engine.run("txt2img", **CALL, on_step=steps.append).images
        with pytest.raises(errors.PipelineFailed):
            engine.run("txt2img", **CALL, on_step=steps.append, callback_on_step_end=fail_second)
        with pytest.raises(errors.InvalidRequest, match="on_step"):
            asyncio.run(anext(engine.stream("txt2img", **CALL, on_step=steps.append)))
    assert [(one.step, one.total) for one in steps] == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize("value", [0, -1, "2", True])
def test_a_deadline_of_the_engine_is_seconds(value):
    with pytest.raises(errors.InvalidOption, match="timeout_s"):
        EngineLimits(timeout_s=value)


@pytest.mark.parametrize("name", ["max_running", "max_queue", "max_batch_rows"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_limits_are_checked(name, value):
    with pytest.raises(errors.InvalidOption, match=name):
        EngineLimits(**{name: value})


def test_a_defect_of_the_scheduling_ends_requests_and_readiness(monkeypatch):
    """Nobody waits for ever, and whoever watches `/readyz` starts the service anew."""
    with engine_with() as engine:
        assert engine.is_ready

        def fail(*_):
            raise KeyError("on purpose")

        monkeypatch.setattr(engine._worker.conductor._baton, "_choose", fail)
        with held(engine, 3):  # one alone is not scheduled
            handles = [engine.submit("txt2img", **CALL) for _ in range(3)]
        for handle in handles:
            with pytest.raises(errors.PipelineFailed, match="on purpose"):
                handle.result(30)
        assert not engine.is_ready


def test_a_closed_engine_is_not_ready():
    engine = engine_with()
    engine.close()
    assert not engine.is_ready


def test_each_step_is_told_with_previews_on_demand_and_the_result_last():
    async def collect(engine, **more):
        return [event async for event in engine.stream("txt2img", **CALL, seed=1, **more)]

    with engine_with() as engine:
        *steps, result = asyncio.run(collect(engine, preview_every=1))
        assert [(one.step, one.total) for one in steps] == [(1, 2), (2, 2)]
        assert steps[0].preview.size == (32, 32)
        assert steps[1].preview is None  # the result itself comes at once
        plain = engine.run("txt2img", **CALL, seed=1)
        assert plain.images[0].tobytes() == result.images[0].tobytes()


def test_leaving_a_stream_cancels_the_request():
    async def leave(engine):
        stream = engine.stream("txt2img", prompt="a", num_inference_steps=900)
        async for _ in stream:
            break
        await stream.aclose()

    with engine_with() as engine:
        asyncio.run(leave(engine))
    assert engine.report().counts["cancelled"] == 1


@pytest.mark.parametrize("steps", [2, 900])
def test_an_event_loop_that_is_closed_cancels_its_stream(gate, caplog, steps):
    """Without a word to it: the request finds out at its next step, or when it is done."""
    call = {"prompt": "a", "num_inference_steps": steps, "callback_on_step_end": gate}
    with engine_with() as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream("txt2img", **call)
        assert loop.run_until_complete(anext(stream)).step == 1
        loop.close()
        gate.opened.set()
    assert engine.report().counts == {"submitted": 1, "cancelled": 1}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_event_loop_that_is_closed_leaves_a_request_that_it_awaits_alone(gate, caplog):
    with engine_with() as engine:
        loop = asyncio.new_event_loop()
        task = loop.create_task(engine.arun("txt2img", **CALL, callback_on_step_end=gate))
        loop.run_until_complete(asyncio.to_thread(gate.reached.wait, 30))
        task._log_destroy_pending = False
        loop.close()
        gate.opened.set()
    assert engine.report().counts == {"submitted": 1, "done": 1}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("name", "cls", "changes"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("dpm++ 2m karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            "DPM++ 2M SDE Exponential",
            "DPMSolverMultistepScheduler",
            {"use_exponential_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        ),
        ("Euler Karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler", {}),
    ],
)
def test_schedulers_by_the_names_that_people_use(name, cls, changes):
    from bentoml_diffusers.engine.requests.schedulers import choose_scheduler

    base = testing.tiny_stable_diffusion().scheduler
    scheduler = choose_scheduler(name, base).build(base)
    assert type(scheduler).__name__ == cls
    assert {key: scheduler.config[key] for key in changes} == changes


def test_schedulers_have_the_name_that_chooses_them():
    from bentoml_diffusers.engine.requests.schedulers import choose_scheduler

    base = testing.tiny_stable_diffusion().scheduler
    samplers = [*_names.SAMPLERS, "DPM++ 2M Karras", "Euler Exponential", "UniPC Beta"]
    schedulers = [choose_scheduler(name, base).build(base) for name in samplers]
    named = [_names.name_sampler(type(one).__name__, one.config) for one in schedulers]
    assert named == samplers


def test_a_scheduler_without_such_a_name_has_that_of_its_class():
    assert _names.name_sampler("PNDMScheduler", {"skip_prk_steps": False}) == "PNDMScheduler"


@pytest.mark.parametrize("name", ["Euler b", "DDIM Karras", "os.system", "FlowMatchEuler", 3])
def test_unknown_schedulers_are_refused(name):
    with engine_with() as engine, pytest.raises(errors.InvalidRequest, match="scheduler"):
        engine.submit("txt2img", **CALL, scheduler=name)


def test_rows_that_did_not_fit_are_not_tried_again():
    profile = CostProfile(64)
    profile.shrink("any", 16)
    assert profile.choose_rows("any", 40) == 8
