"""Replays: real pipelines give the same bytes again, and what differs is refused or told."""

import asyncio
import copy
import importlib.util
import pickle
import sys
import threading
import time

import diffusers
import pytest
import tiny
import torch
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, demo, errors, testing
from bentoml_diffusers.engine import host, recorder
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.workflow import Workflow
from bentoml_diffusers.workflow.record import calls, processor_name, read_environment
from bentoml_diffusers.workflow.replay import (
    plan_replay,
    populate_workflow_from_pipeline,
    replay,
    run_with_workflow,
)

IMAGE = Image.effect_noise((32, 32), 90).convert("RGB")
MASK = Image.new("L", (32, 32), 255)
CALL = {"prompt": "a red circle", "num_inference_steps": 2}
UNCONDITIONAL = {"num_inference_steps": 4}
CALLS = {
    **dict.fromkeys(("ddpm", "ddim", "pndm", "ldm", "karras-ve"), UNCONDITIONAL),
    **dict.fromkeys(("score-sde-ve", "score-sde-vp"), UNCONDITIONAL),
    "dance-diffusion": {"num_inference_steps": 2, "audio_length_in_s": 0.01},
    "sd-inpaint": {**CALL, "image": IMAGE, "mask_image": MASK, "height": 32, "width": 32},
    **dict.fromkeys(("ldm-text", "sd", "sdxl", "sd3"), CALL),
    "flux": {**CALL, "height": 32, "width": 32},
    "pixart-sigma": {**CALL, "use_resolution_binning": False, "clean_caption": False},
}


def travel(workflow):
    return Workflow.from_json(workflow.to_json())


def change(workflow, **fields):
    values = workflow.model_dump()
    for name, value in fields.items():
        part, _, key = name.partition("__")
        if key:
            values[part][key] = value
        else:
            values[part] = value
    return Workflow.model_validate(values).with_blobs(workflow.blobs)


def record(pipeline, **arguments):
    output, workflow = run_with_workflow(pipeline, **arguments)
    return output, travel(workflow)


def assert_repeats(make, workflow, **more):
    """Twice on one new pipeline: nothing is used up by a replay."""
    pipeline = make()
    for _ in range(2):
        _, report = replay(pipeline, workflow, **more)
        assert report.matches is True, report
    return report


def refuses(pipeline, workflow, field):
    with pytest.raises(errors.WorkflowMismatch) as caught:
        replay(pipeline, workflow)
    assert int(caught.value.error_code) == 409
    assert caught.value.field == field
    _, report = replay(pipeline, workflow, strict=False)
    assert report.matches is False
    assert any(text.startswith(field) for text in report.differences)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd(seed=0):
    return quiet(testing.tiny_stable_diffusion(seed))


def img2img():
    parts = testing.tiny_stable_diffusion().components
    return quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


def modular(**more):
    return testing.tiny_modular_stable_diffusion_xl(**more)


@pytest.mark.parametrize("name", sorted(tiny.BUILDERS))
def test_a_call_is_repeated_to_the_bit(name):
    _, workflow = record(tiny.build(name), **CALLS[name])
    report = assert_repeats(lambda: tiny.build(name), workflow)
    assert report.differences == ()


def test_controlnet_is_repeated():
    arguments = {**CALL, "image": IMAGE, "controlnet_conditioning_scale": 0.7}
    _, workflow = record(testing.tiny_controlnet(), **arguments, height=32, width=32)
    assert_repeats(testing.tiny_controlnet, workflow)


def test_the_seed_is_drawn_and_has_32_bits():
    first, second = (record(sd(), **CALL)[1].generators[0].seed for _ in range(2))
    assert first != second
    assert max(first, second) < 2**32


def test_lists_of_generators_a_swapped_scheduler_and_a_callback():
    pipeline = img2img()
    scheduler = diffusers.EulerAncestralDiscreteScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, beta_end=0.03)
    used = torch.Generator().manual_seed(4)
    torch.randn(3, generator=used)

    def on_step(_pipeline, _step, _timestep, _values):
        return {}

    _, workflow = record(
        pipeline,
        **CALL,
        image=[IMAGE, IMAGE.rotate(90)],
        generator=[torch.Generator().manual_seed(1), used],
        num_images_per_prompt=2,
        callback_on_step_end=on_step,
    )
    assert "on_step" in workflow.unsupported["callback_on_step_end"]
    assert [one.seed for one in workflow.generators] == [1, 4]
    report = assert_repeats(img2img, workflow)
    assert "callback_on_step_end" in report.differences[0]


def test_embeddings_are_repeated():
    pipeline = sd()
    embeds = pipeline.encode_prompt("a cat", "cpu", 1, False)[0]
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds * 0.5}
    output, workflow = record(pipeline, **arguments, num_inference_steps=2, output_type="np")
    assert workflow.output.parts[0].kind == "array float32"
    embeds.zero_()  # the workflow has its own
    assert_repeats(sd, workflow)
    assert output.images.shape == (1, 32, 32, 3)


def with_lora(lora_dir, scale=0.7, name="one.safetensors"):
    pipeline = sd()
    pipeline.load_lora_weights(lora_dir / name, adapter_name=name.partition(".")[0])
    pipeline.set_adapters([name.partition(".")[0]], [scale])
    return pipeline


def test_loras_on_the_pipeline_are_seen(lora_dir):
    _, workflow = record(with_lora(lora_dir), **CALL)
    (found,) = workflow.pipeline.attached
    assert (found.kind, found.component, found.scale) == ("lora", "unet", 0.7)
    assert found.details["rank"] == 4
    assert_repeats(lambda: with_lora(lora_dir), workflow)
    for other in (
        sd(),
        with_lora(lora_dir, 0.9),
        with_lora(lora_dir, name="two.safetensors"),
    ):
        refuses(other, workflow, "workflow.pipeline.attached")


def test_a_lora_that_is_not_active_does_not_matter(lora_dir):
    pipeline = with_lora(lora_dir)
    pipeline.disable_lora()
    assert_repeats(sd, record(pipeline, **CALL)[1])


def test_a_fused_lora_is_seen_in_the_weights(lora_dir):
    pipeline = with_lora(lora_dir)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    _, workflow = record(pipeline, **CALL)
    assert workflow.pipeline.attached == []
    refuses(sd(), workflow, "workflow.pipeline.weights_sha256")


def test_added_words_are_seen():
    pipeline = quiet(diffusers.StableDiffusionPipeline.from_pretrained(demo.PIPELINE))
    pipeline.load_textual_inversion(demo.TEXTUAL_INVERSIONS["teal"], token=demo.TOKEN)
    _, workflow = record(pipeline, **CALL)
    (found,) = workflow.pipeline.attached
    assert (found.kind, found.name) == ("textual_inversion", demo.TOKEN)
    plain = quiet(diffusers.StableDiffusionPipeline.from_pretrained(demo.PIPELINE))
    with pytest.raises(errors.WorkflowMismatch):
        replay(plain, workflow)


def test_ip_adapters_are_seen(tmp_path):
    file = testing.save_tiny_ip_adapter(tmp_path)

    def make(scale=0.5):
        pipeline = modular(image_encoder=True)
        pipeline.load_ip_adapter(tmp_path, subfolder="", weight_name=file.name)
        pipeline.set_ip_adapter_scale(scale)
        return pipeline

    given = {**CALL, "height": 32, "width": 32, "output": "images", "ip_adapter_image": IMAGE}
    _, workflow = record(make(), **given)
    (found,) = workflow.pipeline.attached
    assert (found.kind, found.scale) == ("ip_adapter", [0.5])
    assert_repeats(make, workflow)
    refuses(make(0.9), workflow, "workflow.pipeline.attached")


def test_modular_pipelines_are_repeated_with_their_guider():
    pipeline = modular()
    pipeline.update_components(guider=pipeline.guider.new(guidance_scale=3.0))
    given = {**CALL, "height": 32, "width": 32, "image": IMAGE, "strength": 0.9}
    _, workflow = record(pipeline, **given, output="images")
    assert workflow.guider.config["guidance_scale"] == 3.0
    assert "blocks: StableDiffusionXLAutoBlocks" in workflow.pipeline.blocks
    assert_repeats(modular, workflow)  # whose guidance is 7.5
    less = modular(blocks=diffusers.StableDiffusionXLAutoBlocks().get_workflow("image2image"))
    with pytest.raises(errors.WorkflowMismatch, match=r"workflow\.pipeline\.blocks"):
        replay(less, workflow)


def test_the_state_of_a_modular_pipeline_is_compared():
    _, workflow = record(modular(), **CALL, height=32, width=32)  # output=None: all values
    assert len(workflow.output.parts) > 1
    assert_repeats(modular, workflow)


def test_a_replay_changes_nothing():
    pipeline = img2img()
    before, call = copy.deepcopy(vars(pipeline.scheduler)), type(pipeline).__call__
    other = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    _, workflow = record(copy_with(pipeline, other), **CALL, image=IMAGE)
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    replay(pipeline, workflow)
    assert pipeline.scheduler is scheduler
    assert repr(vars(scheduler)) == repr(before)
    assert dict(pipeline.config) == config
    assert type(pipeline).__call__ is call


def copy_with(pipeline, scheduler):
    copied = img2img()
    copied.scheduler = scheduler
    return copied


def test_overrides():
    output, workflow = record(sd(), **CALL)
    for overrides in ({"negative_prompt": "bad"}, {"seed": 1}, {"guidance_scale": 2.0}):
        changed, report = replay(sd(), workflow, **overrides)
        assert report.matches is None
        assert changed.images[0].tobytes() != output.images[0].tobytes()
    one, two = (replay(sd(), workflow, seed=9)[0].images[0] for _ in range(2))
    assert one.tobytes() == two.tobytes()
    with pytest.raises(errors.InvalidRequest, match="negative_prompt"):
        replay(sd(), workflow, negativ_prompt="bad")


def test_a_workflow_without_a_run():
    workflow = travel(populate_workflow_from_pipeline(sd(), CALL))
    assert workflow.output is None
    first, report = replay(sd(), workflow)
    assert report.matches is None
    assert replay(sd(), workflow)[0].images[0].tobytes() == first.images[0].tobytes()


def test_another_model_and_another_class_are_refused():
    _, workflow = record(sd(), **CALL)
    refuses(sd(seed=5), workflow, "workflow.pipeline.weights_sha256")
    with pytest.raises(errors.WorkflowMismatch, match=r"workflow\.pipeline\.class_name"):
        replay(img2img(), workflow)
    half = sd().to(torch.bfloat16)
    with pytest.raises(errors.WorkflowMismatch):
        replay(half, workflow)


CODE = """
import torch
from diffusers import DDPMPipeline
class OwnPipeline(DDPMPipeline):
    def generate(self, generator=None, count=1):
        return self(num_inference_steps=2, generator=generator, batch_size=count)
    def erase(self, folder):
        raise AssertionError(folder)
"""


def own_pipeline(folder, name, code):
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = testing.tiny_ddpm().components
    return quiet(module.OwnPipeline(**parts))


def test_custom_code_is_compared(tmp_path):
    pipeline = own_pipeline(tmp_path, "own_code", CODE)
    _, workflow = record(pipeline, method="generate", count=2)
    assert workflow.pipeline.kind == "custom"
    assert_repeats(lambda: pipeline, workflow)
    changed = own_pipeline(tmp_path, "changed_code", CODE + "\n# changed\n")
    with pytest.raises(errors.WorkflowMismatch, match=r"workflow\.pipeline\.code_sha256"):
        replay(changed, workflow)
    with pytest.raises(errors.InvalidWorkflow, match="takes a generator"):
        replay(pipeline, change(workflow, pipeline__method="erase"))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"num_train_timesteps": 10**9}, "config.num_train_timesteps"),
        ({"trained_betas": [0.1] * 20_000}, "config.trained_betas"),
        ({"beta_schedule": "x" * 200}, "config.beta_schedule"),
    ],
)
def test_a_scheduler_of_an_untrusted_workflow_is_bounded(config, field):
    workflow = populate_workflow_from_pipeline(sd(), CALL)
    odd = change(workflow, scheduler__config={**workflow.scheduler.config, **config})
    with pytest.raises(errors.InvalidWorkflow) as caught:
        replay(sd(), odd)
    assert caught.value.field == f"workflow.scheduler.{field}"
    with pytest.raises(errors.InvalidWorkflow, match="not_a_schedule"):
        replay(sd(), change(workflow, scheduler__config={"beta_schedule": "not_a_schedule"}))
    with pytest.raises(errors.InvalidWorkflow, match=r"scheduler\.class_name"):
        replay(sd(), change(workflow, scheduler__class_name="DanceDiffusionPipeline"))


# -- the engine


@pytest.fixture(scope="module")
def engine(lora_dir):
    with Engine.from_model(testing.tiny_stable_diffusion(), lora_dir=str(lora_dir)) as engine:
        yield engine


LORA = {"name": "one.safetensors", "scale": 0.6}
REQUESTS = {
    "txt2img": ("txt2img", {}),
    "__call__": ("__call__", {"guidance_scale": 2.0}),
    "img2img": ("img2img", {"image": IMAGE, "strength": 0.7, "scheduler": "Euler a"}),
    "gray": ("img2img", {"image": IMAGE.convert("L"), "strength": 0.9}),
    "inpaint": ("inpaint", {"image": IMAGE, "mask_image": MASK, "height": 32, "width": 32}),
    "images": ("txt2img", {"num_images_per_prompt": 2, "seed": [5, 9]}),
    "lora": ("txt2img", {"lora_weights": [LORA, "two.safetensors"], "height": 40}),
    "scheduler": ("txt2img", {"scheduler": "DPM++ 2M Karras"}),
    "generator": ("txt2img", {"generator": torch.Generator().manual_seed(8)}),
    "latents": ("txt2img", {"latents": torch.ones(1, 4, 4, 4), "output_type": "pt"}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_repeated_to_the_bit(engine, name):
    task, given = REQUESTS[name]
    result = engine.run(task, **CALL, **given, return_workflow=True)
    workflow = travel(result.workflow)
    assert workflow == result.workflow
    assert workflow.task == task
    assert tuple(workflow.seeds) == result.seeds
    for _ in range(2):
        again = engine.replay(workflow)
        assert again.replay.matches is True
        assert again.replay.differences == ()
        assert again.seeds == result.seeds
        assert again.workflow is None


def test_what_is_recorded(engine):
    result = engine.run(
        "img2img", **CALL, image=IMAGE, scheduler="Euler a", lora_weights=LORA, seed=3,
        return_workflow=True,
    )  # fmt: skip
    workflow = result.workflow
    assert workflow.pipeline.class_name == "StableDiffusionImg2ImgPipeline"
    assert workflow.scheduler.class_name == "EulerAncestralDiscreteScheduler"
    assert workflow.scheduler.requested == "Euler a"
    assert workflow.arguments["strength"] == 0.8  # a default
    assert workflow.arguments["image"]["size"] == [32, 32]
    assert (workflow.adapters[0].name, workflow.adapters[0].scale) == ("one.safetensors", 0.6)
    assert workflow.adapters[0].details["rank"] == 4
    assert workflow.environment.versions["diffusers"] == diffusers.__version__
    assert not workflow.batched
    assert workflow.output.parts[0].shape == [32, 32]


def test_what_chooses_the_kernels_is_recorded(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    environment = read_environment("cpu")
    assert environment.hardware["cpu"] == processor_name() != ""
    assert environment.numerics["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert environment.numerics["MKL_CBWR"] == "AUTO,STRICT"
    assert "ATEN_CPU_CAPABILITY" not in environment.numerics


def test_overrides_of_an_engine(engine):
    arguments = {**CALL, "lora_weights": LORA, "scheduler": "Euler a"}
    workflow = engine.run("txt2img", **arguments, seed=5, return_workflow=True).workflow
    changed = engine.replay(workflow, negative_prompt="bad", return_workflow=True)
    assert changed.replay.matches is None
    assert changed.workflow.arguments["negative_prompt"] == "bad"
    assert changed.seeds == (5,)
    assert engine.replay(workflow, num_images_per_prompt=3).seeds == (5, 6, 7)
    assert engine.replay(workflow, seed=9).seeds == (9,)
    assert engine.replay(workflow, scheduler="DDIM").scheduler == "DDIMScheduler"
    assert engine.replay(workflow, lora_weights=[]).adapters == ()
    assert engine.replay(workflow, timeout_s=60, return_workflow=True).replay.matches is True
    for name, value in {
        "num_inference_steps": 100_000,
        "negativ_prompt": "bad",
        "seed": -1,
        "scheduler": "None",
        "timeout_s": -1,
    }.items():
        with pytest.raises(errors.InvalidRequest) as caught:
            engine.replay(workflow, **{name: value})
        assert caught.value.field == name


def test_a_path_is_no_workflow(engine):
    for call in (engine.replay, lambda value: replay(sd(), value)):
        with pytest.raises(errors.InvalidRequest, match=r"Workflow\.load"):
            call("diffusion_workflow.json")


def test_steps_times_strength_below_one_is_refused(engine):
    workflow = engine.run("img2img", **CALL, image=IMAGE, return_workflow=True).workflow
    with pytest.raises(errors.InvalidRequest, match="strength"):
        engine.replay(workflow, strength=0.1)


def test_arun_and_stream_return_workflows(engine):
    async def run():
        first = await engine.arun("txt2img", **CALL, return_workflow=True)
        *_, last = [event async for event in engine.stream("txt2img", **CALL, return_workflow=True)]
        return first, last, await engine.areplay(first.workflow)

    first, last, again = asyncio.run(run())
    assert last.workflow.task == "txt2img"
    assert again.replay.matches is True
    copied = pickle.loads(pickle.dumps(first))
    assert copied.workflow == first.workflow
    assert pickle.loads(pickle.dumps(again)).replay == again.replay


def test_a_request_that_does_not_ask_pays_nothing(engine, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("recorded")

    for name in ("capture", "hash_output", "record_call"):
        monkeypatch.setattr(recorder, name, fail)
    monkeypatch.setattr(host, "describe_pipeline", fail)
    monkeypatch.setattr(calls, "read_environment", fail)
    assert engine.run("txt2img", **CALL).workflow is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline__class_name": "FluxPipeline"},
        {"pipeline__method": "save_pretrained"},
        {"pipeline__weights_sha256": "0" * 64},
        {"pipeline__code_sha256": "0" * 64},
        {"scheduler__class_name": "Path"},
        {"arguments": {"prompt": {"$kind": "bytes"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_engine_and_a_plain_pipeline_refuse_the_same(changes):
    pipeline = sd()
    odd = change(run_with_workflow(pipeline, **CALL)[1], **changes)
    with pytest.raises((errors.InvalidWorkflow, errors.WorkflowMismatch)) as plain:
        replay(pipeline, odd)
    with Engine(pipeline) as one, pytest.raises(type(plain.value)) as served:
        one.replay(odd)
    assert str(served.value) == str(plain.value)
    assert served.value.field == plain.value.field


def test_a_batched_request_says_so(engine):
    task, given = "txt2img", {**CALL, "num_inference_steps": 6}
    handles = [engine.submit(task, **given, seed=s, return_workflow=True) for s in range(8)]
    workflows = [handle.result().workflow for handle in handles]
    shared = [workflow for workflow in workflows if workflow.batched]
    assert shared
    report = engine.replay(shared[0]).replay
    assert any("workflow.batched" in text for text in report.differences)
    alone = engine.run(task, **given, exclusive=True, return_workflow=True).workflow
    assert alone.exclusive
    assert not alone.batched


def test_other_versions_are_told_not_refused(engine):
    workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
    versions = {**workflow.environment.versions, "torch": "1.0"}
    report = engine.replay(change(workflow, environment__versions=versions)).replay
    assert report.matches is True
    (text,) = report.differences
    assert text.startswith("workflow.environment.versions.torch was '1.0', here it is '2")


def test_an_output_that_differs_is_told(engine):
    workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
    output = workflow.output.model_copy(update={"sha256": "0" * 64})
    assert engine.replay(workflow.model_copy(update={"output": output})).replay.matches is False


def test_an_engine_and_a_plain_pipeline_repeat_each_other(engine):
    workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
    assert_repeats(sd, workflow)
    _, plain = record(img2img(), **CALL, image=IMAGE)
    assert engine.replay(plain).replay.matches is True
    with_adapter = engine.run("txt2img", **CALL, lora_weights=LORA, return_workflow=True).workflow
    refuses(sd(), with_adapter, "workflow.adapters")


def test_an_engine_of_another_model_refuses(engine):
    workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
    _, unconditional = record(testing.tiny_ddpm(), **UNCONDITIONAL)
    with Engine.from_model(testing.tiny_stable_diffusion(seed=3)) as other:
        with pytest.raises(errors.WorkflowMismatch, match="weights_sha256"):
            other.replay(workflow)
        report = other.replay(workflow, strict=False).replay
        assert report.matches is False
        assert "weights_sha256" in report.differences[0]
        with pytest.raises(errors.WorkflowMismatch, match=r"pipeline\.class_name"):
            other.replay(unconditional)


def test_unknown_arguments_are_refused_or_left_out(engine):
    workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
    odd = change(workflow, arguments={**workflow.arguments, "from_the_future": 1})
    with pytest.raises(errors.WorkflowMismatch, match=r"arguments\.from_the_future"):
        engine.replay(odd)
    assert engine.replay(odd, strict=False).replay.matches is True


def test_an_untrusted_workflow_has_no_method_but_those_that_generate(engine, tmp_path):
    workflow = engine.run("__call__", **CALL, return_workflow=True).workflow
    odd = change(
        workflow,
        pipeline__method="save_pretrained",
        arguments={"save_directory": str(tmp_path / "x")},
    )
    for strict in (True, False):
        with pytest.raises(errors.InvalidWorkflow, match=r"pipeline\.method"):
            engine.replay(odd, strict=strict)
    assert not (tmp_path / "x").exists()


def test_limits_hold_for_an_untrusted_workflow(engine):
    limits = RequestLimits(max_side=32, max_steps=5)
    workflow = engine.run("img2img", **CALL, image=IMAGE, return_workflow=True).workflow
    assert engine.submit_replay(workflow, limits=limits).result().replay.matches is True
    with pytest.raises(errors.InvalidWorkflow, match="num_inference_steps"):
        engine.submit_replay(workflow, limits=limits, num_inference_steps=6)
    large = engine.run("img2img", **CALL, image=IMAGE.resize((40, 40)), return_workflow=True)
    with pytest.raises(errors.InvalidWorkflow, match="40 x 40 pixels"):
        engine.submit_replay(large.workflow, limits=limits)


def test_a_modular_request_is_repeated():
    with Engine.from_model(modular()) as engine:
        for task, given in (
            ("text2image", {"guidance_scale": 3.0}),
            ("img2img", {"image": IMAGE, "strength": 0.9}),
            ("__call__", {}),
        ):
            sizes = {} if task == "img2img" else {"height": 32, "width": 32}
            result = engine.run(task, **CALL, **given, **sizes, return_workflow=True)
            for _ in range(2):
                again = engine.replay(travel(result.workflow))
                assert again.replay.matches is True, again.replay
        guided = change(result.workflow, guider__class_name="PerturbedAttentionGuidance")
        with pytest.raises(errors.WorkflowMismatch, match=r"workflow\.guider"):
            engine.replay(guided)


# -- stored models


SCENE = {"prompt": f"a big {demo.TOKEN} circle", "num_inference_steps": 2}
ADAPTERS = {
    "lora_weights": [{"name": "outline", "scale": 0.8}, "stripes"],
    "textual_inversions": {"name": "teal", "token": demo.TOKEN},
}


@pytest.fixture(scope="module")
def models():
    return bentoml_diffusers.import_demo_models()


@pytest.fixture(scope="module")
def demo_engine(models):
    with Engine.from_model("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def demo_workflow(demo_engine):
    workflow = demo_engine.run("txt2img", **SCENE, **ADAPTERS, return_workflow=True).workflow
    assert demo_engine.replay(workflow).replay.matches is True
    return workflow


def test_a_stored_model_is_named_by_tag_tree_and_origin(demo_workflow, models):
    model = demo_workflow.pipeline.model
    assert model.tag == str(models["demo"].tag)
    assert model.origin == "folder pipeline"
    assert len(model.tree_sha256) == 64
    loras = {one.name: one for one in demo_workflow.adapters}
    assert loras["outline"].tag == str(models["outline"].tag)
    assert loras["teal"].token == demo.TOKEN
    assert "/" not in demo_workflow.to_json().replace("</", "").replace("image/", "")


def test_adapters_are_found_again(demo_workflow, demo_engine):
    assert demo_engine.replay(travel(demo_workflow)).replay.matches is True
    elsewhere = [one.model_dump() for one in demo_workflow.adapters]
    for one in elsewhere:
        one["tag"] = one["name"] + ":of_another_store"
    assert demo_engine.replay(change(demo_workflow, adapters=elsewhere)).replay.matches is True


def test_another_adapter_under_the_name_is_refused(demo_workflow, demo_engine):
    other = [one.model_dump() for one in demo_workflow.adapters]
    other[0]["sha256"] = "0" * 64
    odd = change(demo_workflow, adapters=other)
    with pytest.raises(errors.WorkflowMismatch, match="outline") as caught:
        demo_engine.replay(odd)
    assert caught.value.field == "workflow.adapters[0]"
    assert demo_engine.replay(odd, strict=False).replay.differences


def test_a_missing_adapter_is_named(demo_workflow, demo_engine):
    other = [one.model_dump() for one in demo_workflow.adapters]
    other[0] |= {"name": "gone", "tag": None}
    odd = change(demo_workflow, adapters=other)
    with pytest.raises(errors.AdapterNotFound, match="gone"):
        demo_engine.replay(odd)
    result = demo_engine.replay(odd, strict=False)
    assert [name.partition(":")[0] for name in result.adapters] == ["stripes", "teal"]
    assert any("gone" in text for text in result.replay.differences)


def test_another_model_is_refused(demo_workflow, model):
    with Engine.from_model(model) as engine, pytest.raises(errors.WorkflowMismatch) as caught:
        engine.replay(demo_workflow)
    assert caught.value.field == "workflow.pipeline.model"


@pytest.mark.parametrize("fused", [True, False])
def test_static_adapters_are_compared(demo_engine, fused):
    options = {"lora_weights": ADAPTERS["lora_weights"], "fuse_static_loras": fused}
    words = {"textual_inversions": ADAPTERS["textual_inversions"]}
    with Engine.from_model("demo", **options, **words) as engine:
        workflow = engine.run("txt2img", **SCENE, return_workflow=True).workflow
        assert engine.replay(workflow).replay.matches is True
    static = workflow.pipeline.static_adapters
    assert [one.kind for one in static] == ["lora", "lora", "textual_inversion"]
    assert static[0].is_fused == fused
    with pytest.raises(errors.WorkflowMismatch, match="static_adapters"):
        demo_engine.replay(workflow)


def test_a_loaded_model_repeats_what_its_engine_did(demo_engine):
    workflow = demo_engine.run("txt2img", **CALL, return_workflow=True).workflow
    assert_repeats(lambda: quiet(bentoml_diffusers.load_model("demo")), workflow)


def test_the_runner_returns_workflows(models, run_local):
    run = run_local(models["demo"], "text2img", custom_pipeline="stable_diffusion_mega")
    result = run(**CALL, seed=1, return_workflow=True)
    workflow = travel(result.workflow)
    assert workflow.pipeline.model.tag == str(models["demo"].tag)
    assert workflow.pipeline.method == "text2img"
    with Engine.from_model("demo", custom_pipeline="stable_diffusion_mega") as engine:
        assert engine.replay(workflow).replay.matches is True
    assert isinstance(run(**CALL, seed=1), tuple)


def test_a_replay_can_be_replayed():
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        call = {**CALL, "scheduler": "Euler a", "return_workflow": True}
        first = engine.run("txt2img", **call).workflow
        second = engine.replay(first, return_workflow=True).workflow
        assert second.task == first.task == "txt2img"
        assert second.scheduler == first.scheduler
        assert engine.replay(second).replay.matches


def test_a_replay_that_nobody_waits_for_is_cancelled(monkeypatch):
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        workflow = engine.run("txt2img", **CALL, return_workflow=True).workflow
        planning, go_on = threading.Event(), threading.Event()

        def slow_plan(*args, **options):
            planning.set()
            assert go_on.wait(30)
            return plan_replay(*args, **options)

        monkeypatch.setattr("bentoml_diffusers.engine.engine.plan_replay", slow_plan)

        async def leave():
            waiting = asyncio.ensure_future(engine.areplay(workflow, num_inference_steps=200))
            await asyncio.to_thread(planning.wait, 30)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            go_on.set()

        asyncio.run(leave())  # the loop ends as soon as the request is submitted
        while engine.report().running or engine.report().waiting:
            time.sleep(0.01)
        assert engine.report().counts["cancelled"] == 1
