"""Pipelines that hold pipelines: their requests share forwards, stop, and choose a scheduler."""

import numpy as np
import pytest
import torch
from combined_models import tiny_kandinsky
from holding import held

from bentoml_diffusers import Engine, errors
from bentoml_diffusers.engine.requests.request import Ticket

CALL = {
    "prompt": "a red circle",
    "num_inference_steps": 4,
    "prior_num_inference_steps": 3,
    "height": 64,
    "width": 64,
    "output_type": "np",
}


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny_kandinsky()) as engine:
        yield engine


def test_a_lone_request_is_the_call_of_diffusers_and_counts_all_steps(engine):
    expected = tiny_kandinsky()(**CALL, generator=torch.Generator().manual_seed(7)).images
    result = engine.run("__call__", **CALL, seed=7)
    assert np.array_equal(result.output[0], expected)
    assert result.steps == 3 + 4
    assert result.batches[1] > 3 + 4


def test_progress_goes_over_both_schedulers(engine):
    seen = []
    ticket = Ticket(on_step=lambda step: seen.append((step.step, step.total)))
    engine._submit(ticket, "__call__", (), {"on_step": ticket.on_step, **CALL, "seed": 1}).result(
        60
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 7), (5, 7), (6, 7), (7, 7)]


def test_the_scheduler_of_a_request_steps_the_decoder(engine):
    other = "EulerAncestralDiscreteScheduler"
    base = engine.pipeline.decoder_pipe.scheduler
    own = engine.run("__call__", **CALL, seed=7)
    result = engine.run("__call__", **CALL, seed=7, scheduler=other)
    assert (own.scheduler, result.scheduler) == ("DDPMScheduler", other)
    assert not np.array_equal(result.output[0], own.output[0])
    assert engine.pipeline.decoder_pipe.scheduler is base
    assert np.array_equal(engine.run("__call__", **CALL, seed=7).output[0], own.output[0])


@pytest.mark.parametrize("at", [1, 5])
def test_a_cancelled_request_stops_in_the_prior_as_in_the_decoder(engine, at):
    ticket = Ticket()
    ticket.on_step = lambda step: ticket.cancel() if step.step == at else None
    with pytest.raises(errors.RequestCancelled):
        engine._submit(
            ticket, "__call__", (), {"on_step": ticket.on_step, **CALL, "seed": 1}
        ).result(60)
    assert ticket.steps_done == at


def test_requests_at_once_share_the_forwards_of_the_inner_pipelines(engine):
    lone = [engine.run("__call__", **CALL, seed=seed).output[0] for seed in (1, 2, 3)]
    with held(engine, 3):
        handles = [engine.submit("__call__", **CALL, seed=seed) for seed in (1, 2, 3)]
    for expected, handle in zip(lone, handles, strict=True):
        result = handle.result(60)
        assert result.was_batched
        assert abs(result.output[0] - expected).max() * 255 <= 1
