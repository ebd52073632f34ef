import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from comparing import same_image
from diffusers.hooks import group_offloading
from PIL import Image

from bentoml_diffusers import Engine, _names, errors, testing

CALL = {"prompt": "a red circle", "num_inference_steps": 3}
IMAGE = Image.new("RGB", (32, 32), "green")


@pytest.fixture
def pipeline():
    return testing.tiny_stable_diffusion()


@pytest.fixture
def engine(pipeline, lora_dir):
    with Engine.from_model(pipeline, lora_dir=str(lora_dir)) as engine:
        yield engine


def fingerprint(pipeline):
    """All that a request could leave behind."""
    tensors = {
        f"{name}.{key}": value.clone()
        for name in ("unet", "vae", "text_encoder")
        for key, value in getattr(pipeline, name).state_dict().items()
    }
    scheduler = copy.deepcopy(vars(pipeline.scheduler))
    tokenizer = pipeline.tokenizer
    words = (tokenizer.get_vocab(), tokenizer.padding_side, tokenizer.model_max_length)
    return tensors, repr(scheduler), words, set(vars(pipeline))


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())
    assert before[1:] == after[1:]


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_request_equals_the_call_of_diffusers(engine, pipeline, pixels, scheduler):
    engine.run("txt2img", **CALL, lora_weights="one.safetensors")  # a history
    ours = engine.run("txt2img", **CALL, seed=7, scheduler=scheduler, guidance_scale=3.0)
    reference = testing.tiny_stable_diffusion()
    reference.scheduler = getattr(diffusers, scheduler).from_config(reference.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    theirs = reference(**CALL, generator=generator, guidance_scale=3.0).images[0]
    assert (pixels(ours.images[0]) == pixels(theirs)).all()


def test_tasks_share_one_set_of_weights(engine, pixels):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    given = {**CALL, "image": IMAGE, "strength": 0.7}
    mask = {"mask_image": IMAGE.convert("L")}
    for task, cls, more in (
        ("img2img", StableDiffusionImg2ImgPipeline, {}),
        ("inpaint", StableDiffusionInpaintPipeline, {**mask, "height": 32, "width": 32}),
    ):
        reference = cls(**testing.tiny_stable_diffusion().components, requires_safety_checker=False)
        theirs = reference(**given, **more, generator=torch.Generator().manual_seed(3)).images[0]
        ours = engine.run(task, **given, **more, seed=3).images[0]
        assert (pixels(ours) == pixels(theirs)).all()


def test_weights_are_not_cast_by_another_task(pixels):
    half = testing.tiny_stable_diffusion().to(dtype=torch.bfloat16)
    with Engine.from_model(half) as engine:
        engine.run("img2img", **CALL, image=IMAGE)
        assert half.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_images_of_any_mode_are_taken(engine, mode):
    result = engine.run("img2img", **CALL, image=IMAGE.convert(mode), strength=0.9)
    assert result.images[0].size == (32, 32)


def test_seeds_are_drawn_and_returned(engine, pixels):
    first = engine.run("txt2img", **CALL)
    (seed,) = first.seeds
    assert 0 <= seed < 2**32
    again = engine.run("txt2img", **CALL, seed=seed)
    assert (pixels(first.images[0]) == pixels(again.images[0])).all()


def test_each_image_has_its_seed(engine, pixels):
    result = engine.run("txt2img", **CALL, seed=5, num_images_per_prompt=3)
    assert result.seeds == (5, 6, 7)
    alone = engine.run("txt2img", **CALL, seed=6)
    assert abs(pixels(result.images[1]) - pixels(alone.images[0])).max() <= 1
    with pytest.raises(errors.InvalidRequest, match="seed"):
        engine.run("txt2img", **CALL, seed=[1, 2])


def test_the_output_pickles(engine, pixels):
    result = engine.run("__call__", **CALL, seed=1)
    copied = pickle.loads(pickle.dumps(result))
    assert (pixels(copied.images[0]) == pixels(result.images[0])).all()
    tensors = engine.run("__call__", **CALL, output_type="pt").output[0]
    assert tensors.device.type == "cpu"
    assert not tensors.requires_grad


def test_side_lengths_are_not_dropped(engine):
    assert engine.run("txt2img", **CALL, height=64).images[0].size == (32, 64)
    with pytest.raises(errors.InvalidRequest, match="height"):
        engine.run("txt2img", **CALL, height=63)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", []),
        ("prompt", None),
        ("height", "64"),
        ("height", -8),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("num_inference_steps", 2.5),
        ("guidance_scale", "much"),
        ("guidance_scale", float("nan")),
        ("num_images_per_prompt", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", "x"),
        ("scheduler", "NoScheduler"),
        ("scheduler", "DDPMPipeline"),
        ("lora_weights", 3),
        ("lora_weights", [{"name": "one.safetensors", "scale": "abc"}]),
        ("lora_weights", [{"name": "one.safetensors", "scale": 1e9}]),
        ("lora_weights", [{"scale": 1}]),
        ("negative_promt", "x"),
    ],
)
def test_bad_arguments_name_their_field(engine, field, value):
    with pytest.raises(errors.InvalidRequest, match=field) as caught:
        engine.submit("txt2img", **{**CALL, field: value})
    assert caught.value.error_code == 400


@pytest.mark.parametrize("task", ["_private", "save_pretrained_", "nothing"])
def test_unknown_tasks_are_refused(engine, task):
    with pytest.raises(errors.InvalidRequest, match="task"):
        engine.submit(task, **CALL)


def test_strength_that_leaves_no_step_is_refused(engine):
    with pytest.raises(errors.InvalidRequest, match="strength"):
        engine.submit("img2img", **CALL, image=IMAGE, strength=0.1)


def fail_at(step):
    def callback(pipeline, index, timestep, tensors):
        if index == step:
            raise RuntimeError("on purpose")
        return tensors

    return callback


@pytest.mark.parametrize("lora", [None, "one.safetensors"])
@pytest.mark.parametrize("static", [None, "two.safetensors"])
@pytest.mark.parametrize("step", [None, 0, 1, 2])
def test_nothing_of_a_request_outlives_it(pipeline, lora_dir, pixels, static, lora, step):
    options = {"lora_dir": str(lora_dir), "lora_weights": static}
    with Engine.from_model(pipeline, **options) as engine:
        before = fingerprint(pipeline)
        image = pixels(engine.run("txt2img", **CALL, seed=1).images[0])
        arguments = {"lora_weights": lora, "scheduler": "EulerDiscreteScheduler"}
        if step is None:
            engine.run("txt2img", **CALL, **arguments)
        else:
            with pytest.raises(errors.PipelineFailed, match="on purpose"):
                engine.run("txt2img", **CALL, **arguments, callback_on_step_end=fail_at(step))
        assert_same(before, fingerprint(pipeline))
        assert (pixels(engine.run("txt2img", **CALL, seed=1).images[0]) == image).all()


def test_a_file_that_is_no_lora_leaves_nothing(pipeline, tmp_path, pixels):
    from safetensors.torch import save_file

    wrong = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 99),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": (99, 4),
    }
    save_file({key: torch.ones(shape) for key, shape in wrong.items()}, tmp_path / "w.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with Engine.from_model(pipeline, lora_dir=str(tmp_path)) as engine:
        before = fingerprint(pipeline)
        for file in ("w", "broken", "other"):
            with pytest.raises(errors.InvalidModel, match=file) as caught:
                engine.run("txt2img", **CALL, lora_weights=f"{file}.safetensors")
            assert str(tmp_path) not in str(caught.value)
            assert_same(before, fingerprint(pipeline))


def test_requests_at_once_do_not_disturb_each_other(engine, pixels):
    asked = [
        {
            "prompt": prompt,
            "seed": index,
            "num_inference_steps": 2 + index % 3,
            "guidance_scale": (1.0, 3.0, 7.5)[index % 3],
            "lora_weights": (None, "one.safetensors", ["one.safetensors", "two.safetensors"])[
                index % 3
            ],
        }
        for index, prompt in enumerate(["a red circle", "a blue star", "the green square"] * 4)
    ]
    alone = [pixels(engine.run("txt2img", **one).images[0]) for one in asked]
    with ThreadPoolExecutor(8) as callers:
        together = callers.map(lambda one: engine.run("txt2img", **one), asked)
        for expected, result in zip(alone, together, strict=True):
            assert same_image(pixels(result.images[0]), expected)
    assert len({image.tobytes() for image in alone}) == len(alone)


class Gate:
    """Holds a request at its first step until it is opened."""

    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, pipeline, index, timestep, tensors):
        self.reached.set()
        assert self.opened.wait(30)
        return tensors


def test_cancel_stops_between_steps_and_frees_the_pipeline(engine):
    gate = Gate()
    long = engine.submit("txt2img", prompt="a", num_inference_steps=900, callback_on_step_end=gate)
    waiting = engine.submit("txt2img", **CALL)
    next_one = engine.submit("txt2img", **CALL, seed=1)
    assert gate.reached.wait(30)
    waiting.cancel()
    long.cancel()
    gate.opened.set()
    with pytest.raises(errors.RequestCancelled):
        long.result(30)
    assert long.progress[0] <= 2
    assert next_one.result(30).steps == 3
    with pytest.raises(errors.RequestCancelled):
        waiting.result(30)


def test_a_deadline_stops_a_request_and_counts_the_queue(engine):
    gate = Gate()
    holding = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
    late = engine.submit("txt2img", **CALL, height=56, width=56, timeout_s=0.01)
    assert gate.reached.wait(30)
    gate.opened.set()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        late.result(30)
    assert caught.value.error_code == 504
    assert holding.result(30).images


def test_cancelling_the_awaiting_task_cancels_the_request(engine):
    async def scenario():
        gate = Gate()
        task = asyncio.create_task(
            engine.arun("txt2img", prompt="a", num_inference_steps=900, callback_on_step_end=gate)
        )
        await asyncio.to_thread(gate.reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        return await asyncio.wait_for(engine.arun("txt2img", **CALL), 30)

    assert asyncio.run(scenario()).steps == 3


def test_closing_drains_or_cancels(pipeline):
    engine = Engine.from_model(pipeline)
    handle = engine.submit("txt2img", **CALL)
    engine.close()
    assert handle.result(0).images
    with pytest.raises(errors.RequestCancelled, match="closed"):
        engine.submit("txt2img", **CALL)
    engine = Engine.from_model(pipeline)
    gate = Gate()
    handle = engine.submit("txt2img", **CALL, callback_on_step_end=gate)
    assert gate.reached.wait(30)
    gate.opened.set()
    engine.close(cancel=True)
    assert handle.future.done()
    assert not [one for one in threading.enumerate() if one.name.startswith("diffusers-engine")]


def test_the_device_is_looked_for_once(engine, monkeypatch):
    """Diffusers does that by a walk over all modules, once per request and once per block."""
    looked = []
    look = group_offloading._get_group_onload_device
    monkeypatch.setattr(
        group_offloading, "_get_group_onload_device", lambda part: looked.append(part) or look(part)
    )
    engine.run("txt2img", **CALL)
    assert looked
    looked.clear()
    engine.run("txt2img", **CALL)
    assert not looked


def test_a_task_leaves_the_scheduler_of_the_others_alone(pipeline):
    """Diffusers' inpainting corrects the config of a scheduler that it is given."""
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config)
    before = dict(pipeline.scheduler.config)
    assert not before["skip_prk_steps"]
    call = {"prompt": "a", "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 1}
    generated = {"image": IMAGE, "mask_image": Image.new("L", IMAGE.size, 255)}
    with Engine.from_model(pipeline) as engine:
        first = engine.run("txt2img", **call)
        engine.run("inpaint", **call, **generated, height=32, width=32)
        second = engine.run("txt2img", **call)
    assert first.steps == second.steps
    assert dict(pipeline.scheduler.config) == before


def test_a_pipeline_that_only_inpaints_does_so():
    parts = testing.tiny_flux().components
    pipeline = diffusers.FluxFillPipeline(
        **{
            name: parts[name]
            for name in parts
            if name not in ("image_encoder", "feature_extractor")
        }
    )
    with Engine.from_model(pipeline) as engine:
        assert engine.find_task("inpaint").pipeline_class is diffusers.FluxFillPipeline
        with pytest.raises(errors.InvalidRequest, match="task"):
            engine.find_task("img2img")


def test_unconditional_pipelines_run():
    with Engine.from_model(testing.tiny_ddpm()) as engine:
        result = engine.run("__call__", seed=3, num_inference_steps=2)
    reference = testing.tiny_ddpm()(
        generator=torch.Generator().manual_seed(3), num_inference_steps=2
    )
    assert (np.asarray(result.images[0]) == np.asarray(reference.images[0])).all()


def test_latents_are_cast_to_the_dtype_of_the_denoiser(engine, pixels):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    one, two = (
        pixels(engine.run("txt2img", **CALL, latents=given).images[0])
        for given in (latents, latents.double())
    )
    assert (one == two).all()


@pytest.mark.parametrize("clip_skip", [99, -1, 1.5])
def test_clip_skip_is_within_the_text_encoder(engine, clip_skip):
    with pytest.raises(errors.InvalidRequest, match="clip_skip"):
        engine.submit("txt2img", **CALL, clip_skip=clip_skip)


def test_every_sampler_generates(engine):
    sigmas = ["DPM++ 2M Karras", "Euler Exponential", "UniPC Beta"]
    for name in [*_names.SAMPLERS, *sigmas]:
        assert engine.run("txt2img", **CALL, scheduler=name).images


def test_given_latents_reproduce(engine, pixels):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    first, second = (
        pixels(engine.run("txt2img", **CALL, latents=latents).images[0]) for _ in range(2)
    )
    assert (first == second).all()


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (torch.zeros(2, 4, 4, 4), r"shape \(1, 4, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"shape \(1, 4, 4, 4\)"),
        (torch.zeros(1, 4, 4, 8), r"shape \(1, 4, 4, 4\)"),
        (torch.full((1, 4, 4, 4), float("nan")), "finite numbers"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), "a tensor of floats"),
        (torch.zeros(1, 4, 4, 4).to(torch.float8_e4m3fn), "a tensor of floats"),
        ([[0.0]], "a tensor"),
    ],
    ids=["count", "channels", "size", "nan", "integers", "float8", "list"],
)
def test_wrong_latents_are_refused_at_once(engine, latents, said):
    with pytest.raises(errors.InvalidRequest, match=rf"latents.*{said}"):
        engine.submit("txt2img", **CALL, height=32, width=32, latents=latents)


def test_calls_of_a_runner_share_forwards(model, lora_dir, pixels):
    runner = model.with_options(lora_dir=str(lora_dir)).to_runner()
    runner.init_local(quiet=True)
    calls = [
        {**CALL, "seed": seed, "lora_weights": name}
        for seed, name in ((1, None), (2, "one.safetensors"), (3, "two.safetensors"))
    ]

    async def call_all():
        return await asyncio.gather(*(runner.async_run(**call) for call in calls))

    together = asyncio.run(call_all())
    for output, call in zip(together, calls, strict=True):
        assert abs(pixels(output) - pixels(runner.run(**call))).max() <= 1
    report = runner._runner_handle._runnable.engine.report()
    assert any(size > 1 for size in report.forwards)
