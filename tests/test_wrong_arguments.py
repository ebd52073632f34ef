"""What diffusers would refuse is the caller's fault, named by its field, before anything runs."""

import importlib
import inspect

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from bentoml_diffusers import Engine, errors, testing
from bentoml_diffusers.tasks import read_task
from bentoml_diffusers.tasks.hints import check_hints

IMAGE = Image.new("RGB", (32, 32), "green")
MASK = Image.new("L", (32, 32), 255)
T5 = {"max_sequence_length": 24, "height": 32, "width": 32}
FAMILIES = {
    "sd": (testing.tiny_stable_diffusion, {}),
    "sdxl": (testing.tiny_stable_diffusion_xl, {}),
    "sd3": (testing.tiny_stable_diffusion_3, T5),
    "flux": (testing.tiny_flux, T5),
}
TASKS = {
    "txt2img": {},
    "img2img": {"image": IMAGE, "strength": 1.0},
    "inpaint": {"image": IMAGE, "mask_image": MASK, "strength": 1.0},
}
SCHEDULE = (10, 5)  # DDIM takes none
EMBEDDINGS = np.zeros((1, 24, 32), dtype=np.float32)
WRONG = [
    ("negative_prompt", 3),
    ("negative_prompt", [None]),
    ("negative_prompt", ["a", "b"]),
    ("prompt_embeds", EMBEDDINGS),
    ("prompt_embeds", 3),
    ("prompt_embeds", torch.zeros(1)),
    ("negative_prompt_embeds", EMBEDDINGS),
    ("generator", "x"),
    ("latents", EMBEDDINGS),
    ("latents", torch.zeros(1)),
    ("callback_on_step_end", "x"),
    ("callback_on_step_end_tensor_inputs", ["secrets"]),
    ("ip_adapter_image", IMAGE),
    ("ip_adapter_image_embeds", [torch.zeros(1, 1, 8)]),
    ("timesteps", "x"),
    ("timesteps", SCHEDULE),
    ("sigmas", 3),
    ("return_dict", "x"),
    ("output_type", 3),
    ("cross_attention_kwargs", 3),
    ("joint_attention_kwargs", [1]),
    ("height", "33"),
    ("max_sequence_length", 100_000),
    ("clip_skip", "1"),
    ("image", []),
    ("image", 3),
    ("image", [IMAGE, IMAGE]),
    ("image", torch.zeros(1, 3)),
    ("mask_image", "x"),
    ("padding_mask_crop", "x"),
    ("original_size", 3),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, call = FAMILIES[request.param]
    with Engine.from_model(make()) as engine:
        yield engine, {"prompt": "a red circle", "num_inference_steps": 2, **call}


@pytest.mark.parametrize("task", TASKS)
def test_wrong_arguments_are_named_and_nothing_runs(family, task):
    engine, call = family
    found = engine.find_task(task)
    setter = inspect.signature(engine.pipeline.scheduler.set_timesteps).parameters
    wrong = [
        (field, value)
        for field, value in WRONG
        if found.takes(field) and not (value is SCHEDULE and field in setter)
    ]
    assert len(wrong) > 15
    before = engine.report().forwards
    for field, value in wrong:
        with pytest.raises(errors.InvalidRequest) as caught:
            engine.run(task, **{**call, **TASKS[task], field: value})
        assert field in str(caught.value)
        assert caught.value.error_code == 400
    assert engine.report().forwards == before


def test_what_the_checks_do_not_see_is_still_the_callers_before_the_first_step():
    """Diffusers itself raises, after the text was encoded."""
    with Engine.from_model(testing.tiny_stable_diffusion()) as engine:
        given = {"prompt": ["a"] * 3, "num_inference_steps": 2, "scheduler": "Euler"}
        with pytest.raises(errors.InvalidRequest, match="image"):
            engine.run("img2img", **given, image=[IMAGE, IMAGE])
        generators = [torch.Generator()] * 2
        with pytest.raises(errors.InvalidRequest, match="generators"):
            engine.run("txt2img", **given, generator=generators)


ODD_TENSORS = (
    torch.zeros(1, 24, 17),
    torch.zeros(1, 3, 4, 4, 2),
    torch.zeros(1, 3, 31, 33),
    torch.zeros(1, 0, 16),
    torch.full((1, 24, 16), float("nan")),
)
TENSOR_FIELDS = {
    ("stable_diffusion", "StableDiffusionPipeline"): ("latents",),
    ("stable_diffusion", "StableDiffusionInpaintPipeline"): ("latents",),
    ("stable_diffusion", "StableDiffusionControlNetPipeline"): (
        "latents",
        "negative_prompt_embeds",
    ),
    ("stable_diffusion_xl", "StableDiffusionXLPipeline"): ("latents", "negative_prompt_embeds"),
    ("stable_diffusion_3", "StableDiffusion3Pipeline"): ("latents", "negative_prompt_embeds"),
    ("flux", "FluxPipeline"): ("latents", "prompt_embeds", "negative_ip_adapter_image"),
    ("wan", "WanPipeline"): ("latents", "prompt_embeds", "negative_prompt_embeds"),
}


@pytest.mark.parametrize(("page", "name"), TENSOR_FIELDS)
def test_tensors_that_do_not_fit_are_the_callers_fault(page, name):
    family = importlib.import_module(f"families.{page}").FAMILY
    with Engine(family.build(name)) as engine:
        call = {**family.calls(name)[0], "num_inference_steps": 2}
        for field in TENSOR_FIELDS[page, name]:
            for tensor in ODD_TENSORS:
                given = {**call, field: tensor}
                if field == "prompt_embeds":
                    del given["prompt"]
                with pytest.raises(errors.InvalidRequest, match=field):
                    engine.run("__call__", **given)


def test_a_mask_of_three_channels_is_found_after_the_first_step():
    with Engine(testing.tiny_stable_diffusion()) as engine:
        call = {"prompt": "a red circle", "num_inference_steps": 2, **TASKS["inpaint"]}
        with pytest.raises(errors.InvalidRequest, match="mask_image"):
            engine.run("inpaint", **{**call, "mask_image": torch.zeros(1, 3, 31, 33)})


def test_the_width_of_encoded_text_is_checked_before_the_queue():
    with Engine(testing.tiny_flux()) as engine:
        given = {"prompt_embeds": torch.zeros(1, 24, 32), "num_inference_steps": 2}
        with pytest.raises(errors.InvalidRequest, match=r"shape \(prompts, 16\)"):
            engine.submit("txt2img", **given, pooled_prompt_embeds=torch.zeros(1, 17))
        with pytest.raises(errors.InvalidRequest, match=r"shape \(prompts, tokens, 32\)"):
            engine.submit("txt2img", prompt_embeds=torch.zeros(1, 24, 33), num_inference_steps=2)
        assert not engine.report().forwards


def test_an_odd_tensor_does_not_blame_the_caller_for_another_fault(monkeypatch):
    def fail(*_, **__):
        raise ValueError("on purpose")

    pipeline = testing.tiny_stable_diffusion()
    latents = torch.zeros(1, 4, 4, 4)
    with Engine(pipeline) as engine:
        monkeypatch.setattr(pipeline.unet, "forward", fail)
        with pytest.raises(errors.PipelineFailed, match="on purpose"):
            engine.run("txt2img", prompt="a", num_inference_steps=2, latents=latents)


def test_faults_of_the_server_stay_faults_of_the_server(monkeypatch):
    def fail(*_, **__):
        raise ValueError("on purpose")

    pipeline = testing.tiny_stable_diffusion()
    call = {"prompt": "a", "num_inference_steps": 2}
    with Engine.from_model(pipeline) as engine:
        with pytest.raises(errors.PipelineFailed, match="on purpose"):
            engine.run("txt2img", **call, callback_on_step_end=fail)
        for part in (pipeline.text_encoder, pipeline.vae.decoder, pipeline.unet):
            with monkeypatch.context() as patched:
                patched.setattr(part, "forward", fail)
                with pytest.raises(errors.PipelineFailed, match="on purpose"):
                    engine.run("txt2img", **call)
        assert engine.run("txt2img", **call).images


@pytest.mark.parametrize("make", [testing.tiny_stable_diffusion, testing.tiny_stable_diffusion_xl])
def test_clip_skip_takes_an_earlier_layer(make):
    call = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    with Engine.from_model(make()) as engine:
        plain, last, earlier = (
            engine.run("txt2img", **call, clip_skip=skip).output[0] for skip in (None, 0, 1)
        )
    assert (plain == last).all()
    assert np.abs(plain - earlier).max() > 1e-4


def test_clip_skip_is_what_it_says():
    pipeline = testing.tiny_stable_diffusion()
    encoder = pipeline.text_encoder
    call = {"num_inference_steps": 2, "seed": 1, "output_type": "np", "guidance_scale": 1.0}
    given = pipeline.tokenizer(
        ["a red circle"], padding="max_length", max_length=24, return_tensors="pt"
    )
    states = encoder(given.input_ids, output_hidden_states=True).hidden_states
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    embeddings = norm(states[-2]).detach()
    with Engine.from_model(pipeline) as engine:
        ours = engine.run("txt2img", prompt="a red circle", clip_skip=1, **call).output[0]
        same = engine.run("txt2img", prompt_embeds=embeddings, **call).output[0]
    assert np.abs(ours - same).max() < 1 / 255


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        ("WanImageToVideoPipeline", "last_image", IMAGE),  # "a tensor"
        ("FluxFillPipeline", "image", IMAGE),  # "a FloatTensor"
        ("AnimateDiffVideoToVideoPipeline", "video", [IMAGE, IMAGE]),  # "a list of lists"
        ("StableDiffusion3PAGPipeline", "prompt_embeds", torch.zeros(1, 24, 8).half()),
    ],
)
def test_what_diffusers_takes_is_not_refused_for_its_annotation(cls, name, value):
    task = read_task("__call__", getattr(diffusers, cls))
    check_hints(task, {name: value})
    with pytest.raises(errors.InvalidRequest, match=name):
        check_hints(task, {name: {"a": 1}})
