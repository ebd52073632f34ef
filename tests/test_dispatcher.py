"""The calls of all dialects: split into images, watched, counted, cancelled by who sent them."""

import asyncio
import contextlib

import pytest
from prometheus_client import REGISTRY

from bentoml_diffusers import Engine, RequestLimits, testing
from bentoml_diffusers.errors import InvalidRequest, RequestCancelled, UnreadableRequest
from bentoml_diffusers.serving.calls import Answer, Call, Caller, Done, Preview, Previews, Queued
from bentoml_diffusers.serving.dispatcher import Dispatcher
from bentoml_diffusers.serving.endpoints import classic_endpoints

ARGUMENTS = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 5}
LONG = {**ARGUMENTS, "num_inference_steps": 900}
ME, OTHER = Caller(address="10.0.0.1"), Caller(address="10.0.0.2")


@pytest.fixture(scope="module")
def engine():
    with Engine(testing.tiny_stable_diffusion()) as running:
        yield running


@pytest.fixture(scope="module")
def dispatcher(engine):
    endpoints = classic_endpoints(RequestLimits(max_steps=1000))
    return Dispatcher(engine, {one.task: one.request for one in endpoints})


def outcomes(outcome):
    labels = {"task": "txt2img", "outcome": outcome}
    return REGISTRY.get_sample_value("diffusers_requests_total", labels) or 0


def collect(dispatcher, call):
    async def run():
        return [event async for event in dispatcher.stream(call)]

    return asyncio.run(run())


def pixels(result):
    return result.images[0].tobytes()


def test_each_image_is_that_of_a_lone_request(engine, dispatcher):
    before = outcomes("done")
    arguments = {**ARGUMENTS, "prompt": ["a red circle", "a blue star"]}
    answer = asyncio.run(dispatcher.run(Call(task="txt2img", arguments=arguments, n=2)))
    assert answer.seeds == (5, 6, 7, 8)
    assert outcomes("done") == before + 1
    lone = engine.run("txt2img", **{**ARGUMENTS, "prompt": "a blue star", "seed": 7})
    difference = max(
        abs(a - b) for a, b in zip(pixels(answer.results[2]), pixels(lone), strict=True)
    )
    assert difference <= 1  # shared forwards


def test_the_last_seed_is_followed_by_the_first():
    call = Call(task="txt2img", arguments={"prompt": "a", "seed": 2**32 - 1}, n=2)
    assert [part["seed"] for part in call.split()] == [2**32 - 1, 0]


def test_events_in_order(dispatcher):
    call = Call(task="txt2img", arguments=ARGUMENTS, previews=Previews(count=1, interval_s=0))
    first, *middle, done, answer = collect(dispatcher, call)
    assert first == Queued(0, 0)
    assert [(type(event).__name__, event.step, event.of) for event in middle] == [
        ("Step", 1, 3),
        ("Preview", 1, 3),
        ("Step", 2, 3),
        ("Step", 3, 3),
    ]
    assert middle[2].seconds_left > 0 == middle[-1].seconds_left
    preview = next(event for event in middle if isinstance(event, Preview))
    assert preview.image.size == done.result.images[0].size
    assert isinstance(done, Done)
    assert isinstance(answer, Answer)
    assert answer.results == (done.result,)


def test_the_caller_alone_can_cancel(dispatcher):
    before = outcomes("cancelled")
    call = Call(task="txt2img", arguments=LONG, n=2, request_id="a", caller=ME)

    async def run():
        async for event in dispatcher.stream(call):
            if not isinstance(event, Queued):
                assert not dispatcher.cancel("a", OTHER)
                assert not dispatcher.cancel("b", ME)
                assert dispatcher.cancel("a", ME, "cancelled by its caller")

    with pytest.raises(RequestCancelled, match="by its caller"):
        asyncio.run(run())
    assert not dispatcher.cancel("a", ME)
    assert outcomes("cancelled") == before + 1


def test_a_client_that_goes_away_cancels_its_own_call_only(dispatcher):
    """Though another one has the same id, as clients with a constant one send it."""

    async def run():
        leaving = asyncio.Event()

        async def receive():
            await leaving.wait()
            return {"type": "http.disconnect"}

        gone, stays = (
            Call(task="txt2img", arguments=arguments, request_id="same", caller=ME)
            for arguments in (LONG, ARGUMENTS)
        )
        staying = asyncio.ensure_future(dispatcher.run(stays))
        going = asyncio.ensure_future(dispatcher.run(gone, receive))
        await asyncio.sleep(0)
        leaving.set()
        with pytest.raises(RequestCancelled, match="went away"):
            await going
        assert (await staying).seeds == (5,)

    asyncio.run(run())


def test_closing_a_stream_frees_the_engine(engine, dispatcher):
    async def run():
        async with contextlib.aclosing(
            dispatcher.stream(Call(task="txt2img", arguments=LONG))
        ) as s:
            async for event in s:
                if not isinstance(event, Queued):
                    break
        while engine.report().running:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_one_image_that_fails_ends_the_call(engine, dispatcher):
    before = outcomes("invalid")
    arguments = {**LONG, "scheduler": "NoSuchScheduler"}
    with pytest.raises(InvalidRequest, match="scheduler"):
        asyncio.run(dispatcher.run(Call(task="txt2img", arguments=arguments, n=3)))
    assert outcomes("invalid") == before + 1
    assert not engine.report().running


def test_values_are_read_by_the_fields_of_the_task(dispatcher):
    values = {"prompt": "a", "num_inference_steps": "4", "seed": -1, "lora_weights": "x"}
    arguments = asyncio.run(dispatcher.read("txt2img", values))
    assert arguments["num_inference_steps"] == 4
    assert arguments["guidance_scale"] == 7.5  # what a request gets that leaves it out
    assert arguments["seed"] >= 0
    assert arguments["lora_weights"][0]["name"] == "x"
    with pytest.raises(UnreadableRequest, match="steps: an unknown field"):
        asyncio.run(dispatcher.read("txt2img", {"prompt": "a", "steps": 4}))
