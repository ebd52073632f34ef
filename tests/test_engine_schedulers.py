"""What pipelines do with their schedulers: copy them, hold several, take many steps of a flow."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.engine.requests.request import Ticket


class TwoSchedules(FluxPipeline):
    """Steps two latents, each by a scheduler of its own, as pipelines of video with sound do."""

    def __call__(self, copies=copy.deepcopy, generator=None):
        other = copies(self.scheduler)
        first = second = torch.randn(1, 4, generator=generator)
        for scheduler in (self.scheduler, other):
            scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
        for timestep in self.scheduler.timesteps:
            first = self.scheduler.step(first, timestep, first, return_dict=False)[0]
            second = other.step(second, timestep, second, return_dict=False)[0]
        return (torch.stack([first, second]),)


@pytest.fixture(scope="module")
def two_schedules():
    pipeline = TwoSchedules(**testing.tiny_flux().components)
    with Engine(pipeline) as engine:
        yield engine, pipeline


@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy])
def test_a_copied_scheduler_steps_itself_and_is_not_counted(two_schedules, copies):
    engine, pipeline = two_schedules
    expected = pipeline(copies=copies, generator=torch.Generator().manual_seed(1))[0]
    result = engine.run("__call__", copies=copies, seed=1)
    assert torch.equal(result.output[0], expected)
    assert result.steps == 3
    assert result.scheduler == "FlowMatchEulerDiscreteScheduler"


def test_the_steps_of_a_copy_find_out_that_the_request_is_cancelled(two_schedules):
    engine, _ = two_schedules
    handles = []

    def copies(scheduler):
        handles[0].cancel()
        other = copy.deepcopy(scheduler)
        other.set_timesteps(sigmas=[1.0])
        sample = torch.zeros(1, 4)
        with pytest.raises(errors.RequestCancelled):
            other.step(sample, other.timesteps[0], sample)
        return other

    ticket = Ticket()
    handles.append(ticket)
    handle = engine._submit(ticket, "__call__", (), {"copies": copies, "seed": 1})
    with pytest.raises(errors.RequestCancelled):
        handle.result(60)


def test_a_flow_takes_more_steps_than_it_was_trained_with(pixels):
    pipeline = testing.tiny_flux()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    call = {"prompt": "a red cat", "num_inference_steps": 4, "height": 32, "width": 32}
    expected = pipeline(**call, generator=torch.Generator().manual_seed(2)).images[0]
    with Engine(pipeline) as engine:
        result = engine.run("txt2img", **call, seed=2)
    assert (pixels(result.images[0]) == pixels(expected)).all()
    assert result.steps == 4
