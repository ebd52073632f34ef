"""Many requests at once: each gets the image of its lone run, and nothing of another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from holding import held, skip_verification
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, EngineLimits, errors, testing
from bentoml_diffusers.engine import worker

RED = {"prompt": "a red circle"}
IMAGE = Image.new("RGB", (32, 32), "green")
MIX = ((1.0, 2), (3.0, 3), (7.5, 4))  # guidance, steps


def text_calls(**more):
    return [
        {**RED, "guidance_scale": scale, "num_inference_steps": steps, **more}
        for scale, steps in MIX
    ]


SMALL = {"height": 32, "width": 32}
T5 = {"max_sequence_length": 24, **SMALL}
PIPELINES = {
    "tiny_stable_diffusion": text_calls(),
    "tiny_controlnet": [
        {**call, "image": IMAGE, "controlnet_conditioning_scale": scale}
        for call, scale in zip(text_calls(), (1.0, 0.5, 1.0), strict=True)
    ],
    "tiny_stable_diffusion_xl": text_calls(),
    "tiny_ldm": text_calls(),
    "tiny_ddpm": [{"num_inference_steps": steps} for steps in (2, 3, 4)],
    "tiny_dance_diffusion": [
        {"num_inference_steps": steps, "audio_length_in_s": 512 / 16_000} for steps in (4, 5, 6)
    ],
    "tiny_stable_diffusion_3": text_calls(**T5),
    "tiny_flux": [
        *text_calls(**T5),
        {**RED, **T5, "true_cfg_scale": 3.0, "negative_prompt": "a star", "num_inference_steps": 3},
    ],
    "tiny_pixart_sigma": text_calls(**T5, use_resolution_binning=False, clean_caption=False),
}


def first_of(output):
    """The first image, or sound, as numbers."""
    return np.asarray(output[0][0]).astype(float)


def call_diffusers(pipeline, call, seed):
    pipeline.set_progress_bar_config(disable=True)
    return first_of(pipeline(**call, generator=torch.Generator().manual_seed(seed)))


def run_at_once(engine, calls, task="__call__"):
    with held(engine, len(calls)):
        handles = [engine.submit(task, seed=seed, **call) for seed, call in enumerate(calls)]
    return [handle.result(60) for handle in handles]


@pytest.mark.parametrize("name", PIPELINES)
def test_alone_equals_diffusers_and_together_within_a_level(name):
    calls = PIPELINES[name]
    reference = getattr(testing, name)()
    expected = [call_diffusers(reference, call, seed) for seed, call in enumerate(calls)]
    with Engine.from_model(getattr(testing, name)()) as engine:
        alone = [engine.run("__call__", seed=seed, **call) for seed, call in enumerate(calls)]
        together = run_at_once(engine, calls)
    for result, image in zip(alone, expected, strict=True):
        assert (first_of(result.output) == image).all()
        assert not result.was_batched
    tolerance = 1e-5 if image.dtype.kind == "f" and abs(image).max() <= 2 else 1
    for result, image in zip(together, expected, strict=True):
        assert abs(first_of(result.output) - image).max() <= tolerance
        assert result.was_batched


def test_a_modular_pipeline_with_a_guider_of_each_request():
    def build():
        classic = testing.tiny_stable_diffusion_xl()
        pipeline = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
        known = set(pipeline.component_names)
        pipeline.update_components(
            **{key: part for key, part in classic.components.items() if key in known and part}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    calls = text_calls(**SMALL)
    with Engine.from_model(build()) as engine:
        together = run_at_once(engine, calls, "txt2img")
        lone = engine.run("__call__", seed=1, **calls[1])
    reference = build()
    reference.update_components(guider=reference.guider.new(guidance_scale=3.0))
    call = {key: value for key, value in calls[1].items() if key != "guidance_scale"}
    expected = reference(**call, generator=torch.Generator().manual_seed(1), output="images")
    assert (first_of(lone.output) == np.asarray(expected[0])).all()
    assert abs(first_of(together[1].output) - np.asarray(expected[0])).max() <= 1
    assert all(result.was_batched for result in together)


@pytest.mark.parametrize(
    "scheduler",
    ["DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "DEIS", "DPM++ 2S"],
)
def test_schedulers_of_requests_share_forwards(sd_engine, scheduler):
    calls = [
        {**call, "scheduler": name}
        for call, name in zip(text_calls(), (scheduler, None, "Heun"), strict=True)
    ]
    alone = [sd_engine.run("txt2img", seed=seed, **call) for seed, call in enumerate(calls)]
    for one, two in zip(alone, run_at_once(sd_engine, calls), strict=True):
        assert abs(first_of(one.output) - first_of(two.output)).max() <= 1
        assert one.scheduler == two.scheduler


@pytest.fixture(scope="module")
def sd_engine(lora_dir):
    with Engine.from_model(
        testing.tiny_stable_diffusion(), lora_dir=str(lora_dir), limits=EngineLimits(max_running=9)
    ) as engine:
        yield engine


def images_of(task):
    if task == "txt2img":
        return {}
    given = {"image": IMAGE, "strength": 0.8}
    mask = {"mask_image": Image.linear_gradient("L").resize((32, 32)), "height": 32, "width": 32}
    return given if task == "img2img" else {**given, **mask}


LORAS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["one.safetensors", "two.safetensors"]),
            "scale": st.sampled_from([-0.5, 0.0, 0.3, 1.0]),
        }
    ),
    max_size=2,
)
REQUESTS = st.fixed_dictionaries(
    {
        "task": st.sampled_from(["txt2img", "img2img", "inpaint"]),
        "prompt": st.sampled_from(["a red circle", "a blue star on the left", "square"]),
        "num_inference_steps": st.integers(2, 8),
        "guidance_scale": st.sampled_from([1.0, 2.5, 9.0]),
        "num_images_per_prompt": st.sampled_from([1, 1, 2]),
        "side": st.sampled_from([32, 32, 40]),
        "scheduler": st.sampled_from([None, "Euler a", "DPM++ 2M", "UniPC"]),
        "lora_weights": LORAS,
        "seed": st.integers(0, 2**32 - 1),
        "cancel": st.sampled_from([False, False, False, True]),
    }
)


def as_call(request):
    call = {key: value for key, value in request.items() if key not in ("task", "side", "cancel")}
    task, side = request["task"], request["side"]
    if task == "txt2img":
        call |= {"height": side, "width": side}
    return task, {**call, **images_of(task)}


@pytest.mark.slow
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6))
def test_any_mix_gives_each_request_its_lone_image(sd_engine, requests):
    """The backbone: steps, guidance, sizes, tasks, LoRAs, counts, and cancels in the middle."""
    calls = [as_call(request) for request in requests]
    handles = [sd_engine.submit(task, **call) for task, call in calls]
    for handle, request in zip(handles, requests, strict=True):
        if request["cancel"]:
            handle.cancel()
    for handle, request, (task, call) in zip(handles, requests, calls, strict=True):
        if isinstance(handle.future.exception(60), errors.RequestCancelled):
            assert request["cancel"]
            continue
        together = handle.result(60).images  # also of one that was done before it was cancelled
        alone = sd_engine.run(task, **call).images
        assert len(together) == len(alone) == request["num_images_per_prompt"]
        for one, two in zip(together, alone, strict=True):
            assert abs(np.asarray(one).astype(int) - np.asarray(two).astype(int)).max() <= 1


def test_loras_do_not_bleed_within_a_batch(sd_engine):
    """Eight at once, each with other LoRAs: each is its lone run, and they differ visibly."""
    one, two = "one.safetensors", "two.safetensors"
    wishes = [
        None,
        one,
        two,
        [one, two],
        {"name": one, "scale": -1.0},
        {"name": one, "scale": 0.25},
        [{"name": two, "scale": 2.0}],
        {"name": two, "scale": 0.0},
    ]
    calls = [{**RED, "num_inference_steps": 4, "lora_weights": wish} for wish in wishes]
    with held(sd_engine, len(calls)):
        handles = [sd_engine.submit("txt2img", seed=3, **call) for call in calls]
    together = [first_of(handle.result(60).output) for handle in handles]
    alone = [first_of(sd_engine.run("txt2img", seed=3, **call).output) for call in calls]
    for index, image in enumerate(together):
        assert abs(image - alone[index]).max() <= 1
    assert (alone[0] == alone[7]).all()
    for index in range(1, 7):
        assert abs(alone[index] - alone[0]).max() > 2


def test_equal_loras_are_neighbours_in_a_batch(lora_dir):
    """Each then costs two products per layer, however many requests have it."""
    pipeline = testing.tiny_stable_diffusion()
    wishes = ["one.safetensors", None, "two.safetensors"] * 2
    owners = []
    with Engine.from_model(pipeline, lora_dir=str(lora_dir)) as engine:
        skip_verification(engine)
        pipeline.unet.conv_in.register_forward_pre_hook(
            lambda *_: owners.append(engine._bank._runs_on("unet").run.spans)
        )
        calls = [{**RED, "num_inference_steps": 2, "lora_weights": wish} for wish in wishes]
        run_at_once(engine, calls, "txt2img")
    assert [[span.stop - span.start for span in spans] for spans in owners] == [[4, 4, 4]] * 2


def test_an_error_in_one_request_leaves_the_others_exact(sd_engine):
    def fail(pipeline, index, timestep, tensors):
        raise RuntimeError("on purpose")

    calls = text_calls()
    alone = [sd_engine.run("txt2img", seed=seed, **call) for seed, call in enumerate(calls)]
    bad = sd_engine.submit("txt2img", **RED, num_inference_steps=5, callback_on_step_end=fail)
    together = run_at_once(sd_engine, calls, "txt2img")
    with pytest.raises(errors.PipelineFailed, match="on purpose"):
        bad.result(60)
    for one, two in zip(alone, together, strict=True):
        assert abs(first_of(one.output) - first_of(two.output)).max() <= 1


def test_a_late_and_short_request_overtakes_a_long_one(sd_engine):
    reached = threading.Event()
    order = []

    def notice(pipeline, index, timestep, tensors):
        reached.set()
        return tensors

    long = sd_engine.submit("txt2img", **RED, num_inference_steps=200, callback_on_step_end=notice)
    assert reached.wait(30)
    short = sd_engine.submit("txt2img", **RED, num_inference_steps=2)
    for handle, name in ((long, "long"), (short, "short")):
        handle.future.add_done_callback(lambda _, name=name: order.append(name))
    short.result(60)
    long.result(60)
    assert order == ["short", "long"]


def rows_of_unet(pipeline):
    """A list that fills with the rows of each forward of the UNet."""
    rows = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_all_encode_their_prompts_before_the_first_step():
    """A request without guidance encodes one prompt, the others two."""
    pipeline = testing.tiny_stable_diffusion()
    rows = rows_of_unet(pipeline)
    calls = [{**call, "num_inference_steps": 2} for call in text_calls()]
    with Engine.from_model(pipeline) as engine:
        skip_verification(engine)
        run_at_once(engine, calls, "txt2img")
    assert rows == [5, 5]


def test_the_decoding_of_images_is_shared():
    """Whatever the lowest versions of diffusers and torch tell of a call."""
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        results = run_at_once(engine, [{**RED, "num_inference_steps": 1}] * 2)
        kinds = engine.report().seconds_per_row
    assert {kind[0] for kind in kinds} == {"text_encoder", "unet", "vae.decode"}
    # Two prompts to encode, one step, one image to decode.
    assert [result.batches for result in results] == [{2: 4}, {2: 4}]


def test_a_late_request_joins_the_next_step():
    pipeline = testing.tiny_stable_diffusion()
    rows = rows_of_unet(pipeline)
    with Engine.from_model(pipeline) as engine:
        skip_verification(engine)
        late = []

        def invite(pipeline, index, timestep, tensors):
            if index == 1:
                late.append(engine.submit("txt2img", **RED, num_inference_steps=2))
                give_up = time.monotonic() + 30
                while not engine._worker.conductor._baton.ready and time.monotonic() < give_up:
                    time.sleep(0.001)
            return tensors

        engine.run("txt2img", **RED, num_inference_steps=6, callback_on_step_end=invite)
        late[0].result(60)
    assert rows == [2, 2, 4, 4, 2, 2]


@pytest.mark.slow
def test_a_compiled_denoiser_gets_batches_of_few_sizes():
    pipeline = testing.tiny_stable_diffusion()
    pipeline.unet.mid_block.compile(backend="eager")
    rows = rows_of_unet(pipeline)
    calls = [{**RED, "num_inference_steps": 3} for _ in range(3)]
    expected = [call_diffusers(testing.tiny_stable_diffusion(), calls[0], seed) for seed in (0, 1)]
    with Engine.from_model(pipeline) as engine:
        results = run_at_once(engine, calls, "txt2img")
    assert set(rows) <= {2, 4, 8}
    assert 8 in rows  # six rows and two of padding
    for result, image in zip(results, expected, strict=False):
        assert abs(first_of(result.output) - image).max() <= 1


class MemoryOf:
    """Stands for a device whose memory ends beyond some rows."""

    def __init__(self, module, rows):
        self.real, self.rows, self.seen = module.forward, rows, []

    def __call__(self, sample, *args, **kwargs):
        self.seen.append(len(sample))
        if len(sample) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory, or so")
        return self.real(sample, *args, **kwargs)


def test_too_little_memory_splits_the_batch_then_fails_only_what_does_not_fit(monkeypatch):
    pipeline = testing.tiny_stable_diffusion()
    calls = [{**RED, "num_inference_steps": 3} for _ in range(4)]
    with Engine.from_model(pipeline) as engine:
        alone = [engine.run("txt2img", seed=seed, **call) for seed, call in enumerate(calls)]
        memory = MemoryOf(pipeline.unet, rows=4)
        monkeypatch.setattr(pipeline.unet, "forward", memory)
        together = run_at_once(engine, calls, "txt2img")
        assert max(memory.seen) > 4
        for one, two in zip(alone, together, strict=True):
            assert abs(first_of(one.output) - first_of(two.output)).max() <= 1
        too_large = engine.submit("txt2img", **calls[0], num_images_per_prompt=3)
        fits = engine.submit("txt2img", **calls[0])
        with pytest.raises(errors.DeviceOutOfMemory) as caught:
            too_large.result(60)
        assert caught.value.error_code == 503
        assert fits.result(60).images


def test_exclusive_requests_run_alone_and_equal_diffusers(sd_engine):
    calls = text_calls()
    expected = call_diffusers(testing.tiny_stable_diffusion(), calls[1], 5)
    before = [sd_engine.submit("txt2img", **call) for call in calls]
    exclusive = sd_engine.submit("txt2img", seed=5, exclusive=True, **calls[1])
    after = [sd_engine.submit("txt2img", **call) for call in calls]
    result = exclusive.result(60)
    assert (first_of(result.output) == expected).all()
    assert not result.was_batched
    assert all(handle.result(60).images for handle in [*before, *after])


def test_a_deadline_passes_while_an_exclusive_request_runs(sd_engine):
    running = threading.Event()

    def dawdle(pipeline, index, timestep, tensors):
        running.set()
        time.sleep(0.01)  # 9 s in all: it is cancelled long before
        return tensors

    call = {**RED, "num_inference_steps": 900, "callback_on_step_end": dawdle}
    long = sd_engine.submit("txt2img", **call, exclusive=True)
    assert running.wait(60)  # or the other one may be first, and in time
    new = {"height": 48, "width": 48}  # else it is known what it takes, and it is refused at once
    late = sd_engine.submit("txt2img", **RED, **new, num_inference_steps=2, timeout_s=0.3)
    with pytest.raises(errors.DeadlineExceeded):
        late.result(60)
    assert not long.future.done()
    long.cancel()


def test_a_step_cache_makes_the_engine_exclusive(monkeypatch):
    said = []
    monkeypatch.setattr(worker.logger, "info", lambda text, *values: said.append(text % values))
    pipeline = testing.tiny_flux()
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05))
    with Engine.from_model(pipeline) as engine:
        results = run_at_once(engine, PIPELINES["tiny_flux"][:3])
    assert not any(result.was_batched for result in results)
    assert said == ["requests run one at a time: transformer has a step cache"]


@pytest.mark.parametrize(
    "cache",
    [{"name": "faster_cache", "is_guidance_distilled": True}, "pyramid_attention_broadcast"],
    ids=str,
)
def test_a_step_cache_sees_the_timestep_of_the_request(name, tmp_path, cache):
    testing.tiny_flux().save_pretrained(tmp_path)
    model = bentoml_diffusers.import_model(name, tmp_path)
    with Engine.from_model(model, device="cpu", step_cache=cache) as engine:
        assert engine.run("txt2img", **PIPELINES["tiny_flux"][2]).steps == 4


def threads():
    """Those that run, without that of the first progress bar, which stays."""
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


@pytest.mark.slow
def test_a_thousand_requests_from_many_threads_leave_nothing_behind(lora_dir):
    """One in ten is cancelled, one in twenty fails on purpose."""
    threads_before = threads()
    engine = Engine.from_model(
        testing.tiny_stable_diffusion(),
        lora_dir=str(lora_dir),
        limits=EngineLimits(max_running=32, max_queue=1000),
    )
    fixed = {**RED, "num_inference_steps": 2, "seed": 1}
    first = first_of(engine.run("txt2img", **fixed).output)

    def fail(pipeline, index, timestep, tensors):
        raise RuntimeError("on purpose")

    def one(number):
        call = {
            **RED,
            "num_inference_steps": 1 + number % 2,
            "guidance_scale": 1.0 + number % 3,
            "seed": number,
            "lora_weights": [None, "one.safetensors", "two.safetensors"][number % 3],
        }
        if number % 20 == 3:
            call["callback_on_step_end"] = fail
        handle = engine.submit("txt2img", **call)
        if number % 10 == 0:
            handle.cancel()
        try:
            return len(handle.result(120).images)
        except errors.DiffusersError as error:
            return type(error).__name__

    with ThreadPoolExecutor(32) as callers:
        outcomes = list(callers.map(one, range(1000)))
    counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
    assert counts == {1: 850, "RequestCancelled": 100, "PipelineFailed": 50}
    report = engine.report()
    assert (report.running, report.waiting) == (0, 0)
    assert report.counts["submitted"] == 1001
    assert (first_of(engine.run("txt2img", **fixed).output) == first).all()
    engine.close()
    assert threads() <= threads_before
