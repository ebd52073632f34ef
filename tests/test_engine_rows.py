"""Modules that read the meaning of a row from its place in the batch are not shared."""

import logging

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from holding import held

from bentoml_diffusers import Engine, ModelOptions, errors, testing
from bentoml_diffusers.engine.forwards import padding
from bentoml_diffusers.engine.forwards.padding import PaddedText
from bentoml_diffusers.engine.forwards.verification import compare_outputs
from bentoml_diffusers.engine.requests.request import Ticket

CALL = {"prompt": "a red cat", "num_inference_steps": 4, "output_type": "np"}
SEEDS = (1, 2, 3)


class Perturbed(StableDiffusionPAGPipeline):
    """Perturbed attention guidance under a name that nobody knows."""


class SecondHalf(AttnProcessor):
    """Attention in the second half of a batch only."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        attended = super().__call__(attn, hidden_states, *args, **kwargs)
        half = len(hidden_states) // 2
        return torch.cat([hidden_states[:half], attended[half:]])


class Cancelling(UNet2DConditionModel):
    """Loses half of its digits: what is rounded in a batch grows by four orders of magnitude."""

    def forward(self, sample, *args, **kwargs):
        (output,) = super().forward(sample, *args, **{**kwargs, "return_dict": False})
        large = 1e4 * sample
        return ((output + large) - large,)


def make_perturbed():
    parts = testing.tiny_stable_diffusion().components
    pipeline = Perturbed(**parts, requires_safety_checker=False)
    pipeline.set_pag_applied_layers(["mid", "up", "down"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_halves():
    pipeline = testing.tiny_stable_diffusion()
    pipeline.unet.set_attn_processor(SecondHalf())
    return pipeline


def make_cancelling():
    pipeline = testing.tiny_stable_diffusion()
    pipeline.unet.__class__ = Cancelling
    return pipeline


def run_at_once(engine, calls):
    with held(engine, len(calls)):
        handles = [engine.submit("__call__", **call) for call in calls]
    return [handle.result(60) for handle in handles]


def run_one_by_one(engine, calls):
    return [engine.run("__call__", **call) for call in calls]


def levels_off(results, expected):
    pairs = zip(results, expected, strict=True)
    return [float(abs(here.output[0] - there.output[0]).max()) * 255 for here, there in pairs]


def shared_forwards(result):
    return sum(number for size, number in result.batches.items() if size > 1)


def test_processors_that_a_request_brings_serve_nobody_else():
    calls = [{**CALL, "seed": seed, "pag_scale": scale} for seed, scale in enumerate((3, 0, 3, 0))]
    pipeline = make_perturbed()
    generator = torch.Generator().manual_seed(0)
    diffusers_own = pipeline(**CALL, pag_scale=3, generator=generator).images
    processors = dict(pipeline.unet.attn_processors)
    with Engine(pipeline) as engine:
        lone = run_one_by_one(engine, calls)
        together = run_at_once(engine, calls)
    assert np.array_equal(lone[0].output[0], diffusers_own)
    assert max(levels_off(together, lone)) <= 1
    assert [max(result.batches) > 1 for result in together] == [True] * 4  # the text encoder's
    assert shared_forwards(together[1]) > 1  # and of its steps
    assert dict(pipeline.unet.attn_processors) == processors


@pytest.mark.parametrize("others", [0, 2])
def test_processors_go_back_when_their_request_is_cancelled(others):
    pipeline = make_perturbed()
    processors = dict(pipeline.unet.attn_processors)
    plain = {**CALL, "pag_scale": 0}
    with Engine(pipeline) as engine:
        expected = engine.run("__call__", **plain, seed=5).output[0]
        ticket = Ticket()
        ticket.on_step = lambda _: ticket.cancel()
        with held(engine, 1 + others):
            waiting = [engine.submit("__call__", **plain, seed=5) for _ in range(others)]
            handle = engine._submit(
                ticket,
                "__call__",
                (),
                {"on_step": ticket.on_step, **CALL, "pag_scale": 3, "seed": 1},
            )
        with pytest.raises(errors.RequestCancelled):
            handle.result(60)
        after = [one.result(60) for one in waiting] + [engine.run("__call__", **plain, seed=5)]
    assert all(abs(result.output[0] - expected).max() * 255 <= 1 for result in after)
    assert dict(pipeline.unet.attn_processors) == processors


def test_a_request_that_waits_to_be_alone_can_be_cancelled():
    with Engine(make_perturbed()) as engine:
        tickets = [Ticket(), Ticket()]
        # The plain request steps first; by then the other one waits until it is done.
        tickets[0].on_step = lambda _: tickets[1].cancel()
        with held(engine, 2):
            handles = [
                engine._submit(
                    ticket,
                    "__call__",
                    (),
                    {"on_step": ticket.on_step, **CALL, "pag_scale": scale, "seed": 1},
                )
                for ticket, scale in zip(tickets, (0, 3), strict=True)
            ]
        with pytest.raises(errors.RequestCancelled):
            handles[1].result(60)
        assert handles[0].result(60).steps == CALL["num_inference_steps"]
        assert tickets[1].steps_done == 0


def test_a_module_whose_rows_depend_on_each_other_is_found_and_not_shared(caplog):
    calls = [{**CALL, "seed": seed} for seed in SEEDS]
    with Engine(make_halves()) as engine, caplog.at_level(logging.WARNING):
        lone = run_one_by_one(engine, calls)
        together = run_at_once(engine, calls)
        again = run_at_once(engine, [{**call, "height": 64} for call in calls])
    assert levels_off(together, lone) == [0, 0, 0]
    said = [record.message for record in caplog.records if "unet" in record.message]
    assert len(said) == 1
    assert "are not shared" in said[0]
    assert all(result.was_batched for result in again)  # its text encoder and decoder are
    assert all(result.batches[1] >= CALL["num_inference_steps"] for result in again)


def test_a_module_that_amplifies_rounding_is_shared(caplog):
    calls = [{**CALL, "seed": seed} for seed in SEEDS]
    with Engine(make_cancelling()) as engine, caplog.at_level(logging.WARNING):
        together = run_at_once(engine, calls)
    assert not caplog.records
    assert all(shared_forwards(result) > 1 for result in together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_row_of_many_is_told_from_rounding(dtype):
    step = torch.finfo(dtype).eps
    lone = [(torch.rand(2, 64) + 1).to(dtype) for _ in range(3)]
    rounded = [output * (1 + step) for output in lone]

    def perturb(index, share):
        return lone[index] * (1 + share)

    assert compare_outputs(rounded, lone, perturb).is_same
    misplaced = [*lone[:2], torch.stack([lone[2][0], lone[1][1]])]
    assert not compare_outputs(misplaced, lone, perturb).is_same


def test_only_the_first_shared_forward_of_a_kind_is_verified():
    pipeline = testing.tiny_stable_diffusion()
    calls = [{**CALL, "seed": seed} for seed in SEEDS]
    ran = []
    for module in (pipeline.text_encoder, pipeline.unet, pipeline.vae.decoder):
        module.register_forward_hook(lambda *_: ran.append(1))
    beyond = []
    with Engine(pipeline) as engine:
        for _ in range(2):
            before = len(ran), sum(engine.report().forwards.values())
            run_at_once(engine, calls)
            after = len(ran), sum(engine.report().forwards.values())
            beyond.append(after[0] - before[0] - (after[1] - before[1]))
    assert beyond[0] > len(SEEDS)
    assert beyond[1] == 0


class Careless(UNet2DConditionModel):
    """Says that it reads a mask of its text, and takes padding for text."""

    def forward(self, sample, timestep, encoder_hidden_states, mask=None, **more):
        return super().forward(sample, timestep, encoder_hidden_states, **more)


def test_padding_that_changes_an_image_is_found_and_left_out(caplog, monkeypatch):
    texts = (PaddedText("encoder_hidden_states", "mask"),)
    monkeypatch.setitem(padding._TEXTS, "Careless", texts)
    pipeline = testing.tiny_stable_diffusion()
    pipeline.unet.__class__ = Careless
    embeds = [torch.rand(1, length, 16) * 5 for length in (3, 3, 9)]
    calls = [
        {**CALL, "prompt": None, "prompt_embeds": text, "guidance_scale": 1.0, "seed": seed}
        for seed, text in enumerate(embeds)
    ]
    with Engine(pipeline) as engine, caplog.at_level(logging.WARNING):
        lone = run_one_by_one(engine, calls)
        together = [run_at_once(engine, calls) for _ in range(2)]
    for results in together:
        assert max(levels_off(results, lone)) <= 1
        runs = engine._worker.conductor._runs
    assert "unet" not in runs._unjoinable  # those of equal length are shared
    assert runs._strict == {"unet"}
    said = [record.message for record in caplog.records if "unlike" in record.message]
    assert len(said) == 1


def test_requests_with_unlike_loras_are_verified_on_their_own(caplog, lora_dir):
    """The first shared forwards are without LoRAs, and right."""
    pipeline = testing.tiny_stable_diffusion()
    block = pipeline.unet.mid_block.attentions[0]
    forward = block.forward

    def roll(hidden_states, encoder_hidden_states=None, **more):
        states = forward(hidden_states.flip(0), encoder_hidden_states.flip(0), **more)
        return tuple(state.flip(0) for state in states)

    block.forward = roll
    calls = [{**CALL, "guidance_scale": 1.0, "seed": seed} for seed in SEEDS]
    names = (None, "one.safetensors", "two.safetensors")
    mixed = [{**call, "lora_weights": name} for call, name in zip(calls, names, strict=True)]
    options = ModelOptions(lora_dir=str(lora_dir))
    with Engine(pipeline, options) as engine, caplog.at_level(logging.WARNING):
        run_at_once(engine, calls)
        assert not caplog.records
        lone = run_one_by_one(engine, mixed)
        together = [run_at_once(engine, mixed) for _ in range(2)]
    for results in together:
        assert max(levels_off(results, lone)) <= 1
    assert engine._worker.conductor._runs._strict == {"unet"}
    assert max(shared_forwards(result) for result in together[1]) <= 2  # text and decoder
    assert len([record for record in caplog.records if "unlike" in record.message]) == 1
