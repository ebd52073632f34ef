"""Several images that start from one: each is that of the lone run with its reported seed."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from comparing import same_image
from families.stable_diffusion_3 import FAMILY as sd3
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.engine.requests.request import Ticket
from bentoml_diffusers.workflow.replay import join_outputs, split_by_image

RANDOM = np.random.default_rng(0)
IMAGE, OTHER = (
    Image.fromarray(RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)
)
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (8, 8, 24, 24))
CALL = {"prompt": "a red circle", "num_inference_steps": 4}
IMG2IMG = {**CALL, "image": IMAGE, "strength": 0.8}
SIZE = {"height": 32, "width": 32}
INPAINT = {**IMG2IMG, **SIZE, "mask_image": MASK}
T5 = {"max_sequence_length": 24}
TASKS = {
    "sd-img2img": ("tiny_stable_diffusion", "img2img", IMG2IMG),
    "sd-inpaint": ("tiny_stable_diffusion", "inpaint", INPAINT),
    "sdxl-inpaint": ("tiny_stable_diffusion_xl", "inpaint", INPAINT),
    "controlnet": ("tiny_controlnet", "__call__", {**CALL, "image": IMAGE}),
    "controlnet-inpaint": ("tiny_controlnet", "inpaint", {**INPAINT, "control_image": IMAGE}),
    "flux-img2img": ("tiny_flux", "img2img", {**IMG2IMG, **SIZE, **T5}),
    "flux-inpaint": ("tiny_flux", "inpaint", {**INPAINT, **T5}),
    "sd3-img2img": ("tiny_stable_diffusion_3", "img2img", {**IMG2IMG, **SIZE, **T5}),
}


@pytest.fixture(scope="module")
def engine_of():
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(name):
            return stack.enter_context(Engine(getattr(testing, name)()))

        yield start


def levels_off(here, there):
    return abs(np.asarray(here).astype(int) - np.asarray(there).astype(int)).max()


@pytest.mark.parametrize("name", TASKS)
def test_each_image_is_that_of_its_seed(engine_of, name):
    pipeline, task, call = TASKS[name]
    engine = engine_of(pipeline)
    result = engine.run(task, **call, seed=[8, 7, 8], num_images_per_prompt=3)
    assert result.seeds == (8, 7, 8)
    lone = [engine.run(task, **call, seed=seed).images[0] for seed in (8, 7)]
    off = [levels_off(*pair) for pair in zip(result.images, [*lone, lone[0]], strict=True)]
    assert max(off) <= 1
    assert levels_off(*lone) > 1


@pytest.mark.parametrize("name", ["sd-inpaint", "sd3-img2img"])
def test_generators_of_the_caller_go_with_their_images(engine_of, name):
    pipeline, task, call = TASKS[name]
    engine = engine_of(pipeline)
    seeds = (8, 7)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = engine.run(task, **call, generator=generators, num_images_per_prompt=2)
    assert result.seeds == ()
    lone = [engine.run(task, **call, seed=seed).images[0] for seed in seeds]
    assert max(levels_off(*pair) for pair in zip(result.images, lone, strict=True)) <= 1


def test_noise_that_diffusers_draws_without_a_generator_is_that_of_the_seed():
    """The control image of SD3 is encoded with PyTorch's global generator."""
    name = "StableDiffusion3ControlNetPipeline"
    with Engine(sd3.build(name)) as engine:
        call = sd3.calls(name)[0]
        first, other, again = (
            engine.run("__call__", **call, seed=seed).output[0] for seed in (7, 8, 7)
        )
        two = engine.run("__call__", **call, seed=7, num_images_per_prompt=2).output[0]
    assert np.array_equal(first, again)
    assert not same_image(first, other)
    assert same_image(two, np.concatenate([first, other]))


def test_alone_they_are_equal_to_the_bit(engine_of):
    engine = engine_of("tiny_stable_diffusion")
    call = {**INPAINT, "output_type": "np"}
    result = engine.run("inpaint", **call, seed=7, num_images_per_prompt=2, exclusive=True)
    lone = [engine.run("inpaint", **call, seed=seed).output[0] for seed in result.seeds]
    assert np.array_equal(result.output[0], np.concatenate(lone))


def test_prompts_and_images_go_together(engine_of):
    engine = engine_of("tiny_stable_diffusion")
    prompts, images = ["a red circle", "a star"], [IMAGE, OTHER]
    given = {"strength": 0.8, "num_inference_steps": 4}
    result = engine.run(
        "img2img", prompt=prompts, image=images, **given, seed=3, num_images_per_prompt=2
    )
    assert result.seeds == (3, 4, 5, 6)
    for index, seed in enumerate(result.seeds):
        one = {"prompt": prompts[index // 2], "image": images[index // 2]}
        lone = engine.run("img2img", **one, **given, seed=seed)
        assert levels_off(result.images[index], lone.images[0]) <= 1


def test_they_share_forwards_and_count_as_one_request(engine_of):
    engine = engine_of("tiny_stable_diffusion")
    seen = []
    ticket = Ticket(on_step=lambda step: seen.append((step.step, step.total)))
    given = {**INPAINT, "seed": 1, "num_images_per_prompt": 3, "strength": 1.0}
    result = engine._submit(ticket, "inpaint", (), {**given, "on_step": ticket.on_step}).result(60)
    total = result.steps
    assert [step for step, _ in seen] == list(range(1, total + 1))
    assert {count for _, count in seen} == {ticket.steps_total}
    assert result.was_batched


@pytest.mark.parametrize("exclusive", [False, True])
def test_all_of_them_stop_when_the_request_is_cancelled(engine_of, exclusive):
    ticket = Ticket()
    ticket.on_step = lambda _: ticket.cancel()
    given = {**INPAINT, "seed": 1, "num_images_per_prompt": 3, "exclusive": exclusive}
    engine = engine_of("tiny_stable_diffusion")
    with pytest.raises(errors.RequestCancelled):
        engine._submit(ticket, "inpaint", (), {**given, "on_step": ticket.on_step}).result(60)
    assert engine.report().running == 0


@pytest.mark.parametrize("seed", [5, [9, 2]])
def test_their_workflow_replays(engine_of, seed):
    engine = engine_of("tiny_stable_diffusion")
    call = {**INPAINT, "num_images_per_prompt": 2, "exclusive": True}
    result = engine.run("inpaint", **call, seed=seed, return_workflow=True)
    assert engine.replay(result.workflow).replay.matches
    parts = testing.tiny_stable_diffusion().components
    cls = getattr(__import__("diffusers"), result.workflow.pipeline.class_name)
    plain = cls(**parts, requires_safety_checker=False)
    output, told = bentoml_diffusers.replay(plain, result.workflow)
    assert told.matches
    assert len(output.images) == 2


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"prompt": "x", "num_images_per_prompt": 2}, 2),
        ({"prompt": "x", "image": IMAGE}, 1),
        ({"prompt": ["x", "y"], "image": [IMAGE, OTHER]}, 2),
        ({"prompt": "x", "image": [IMAGE, OTHER], "num_images_per_prompt": 2}, 2),
        ({"prompt": "x", "ip_adapter_image": IMAGE, "num_images_per_prompt": 2}, 2),
    ],
)
def test_what_is_right_in_one_call_stays_one(arguments, count):
    assert split_by_image(arguments, count) == [arguments]


def test_what_is_given_for_each_prompt_or_image_is_divided():
    embeds, latents = torch.rand(2, 3, 4), torch.rand(4, 1, 2, 2)
    parts = split_by_image(
        {
            "prompt_embeds": embeds,
            "negative_prompt": ["a", "b"],
            "image": torch.rand(1, 3, 8, 8),
            "control_image": [IMAGE, OTHER],
            "latents": latents,
            "guidance_scale": 2.0,
            "num_images_per_prompt": 2,
        },
        4,
    )
    assert [part["negative_prompt"] for part in parts] == ["a", "a", "b", "b"]
    assert all(len(part["image"]) == 1 for part in parts)
    assert all(part["control_image"] == [IMAGE, OTHER] for part in parts)
    assert all(part["num_images_per_prompt"] == 1 for part in parts)
    assert torch.equal(torch.cat([part["latents"] for part in parts]), latents)
    assert torch.equal(parts[3]["prompt_embeds"], embeds[1:])


def test_outputs_are_joined_as_one_call_returns_them():
    joined = join_outputs([([1], torch.zeros(1, 2), None), ([2], torch.ones(1, 2), None)])
    assert joined[0] == [1, 2]
    assert joined[1].tolist() == [[0, 0], [1, 1]]
    assert joined[2] is None
