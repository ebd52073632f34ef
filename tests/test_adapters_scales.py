"""Scales by component and block, and the denoiser that a LoRA is for, against diffusers itself."""

import functools

import pytest
import torch
from adapter_models import (
    ATTENTION,
    FAMILIES,
    TEXT,
    generate,
    generate_alone,
    generate_by_peft,
    generate_together,
    save_lora,
    tiny_wan,
)
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import Engine, ModelOptions, errors, testing
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.workflow.files import make_infotext, summarize

EXACT = 5e-6  # float32: scales multiply in another order than in PEFT
SCALES = [
    {"unet": 0.5, "text_encoder": -1.0},
    {"text_encoder": 0.25},
    {"unet": {"down": 0.3}},
    {"unet": {"mid": 0, "up": 2, "down": 1}},
    {"unet": {"mid": [0.5], "up": {"block_0": [0.1, 0.9]}}, "text_encoder": 0},
    {"unet": {"down": {"block_1": 0.2}, "up": [0.4, 0.7]}},
    {"text_encoder": {"layers.0": 0.5, "layers.1.self_attn.q_proj": 3}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scales")
    make = testing.tiny_stable_diffusion
    everything = {"unet": [*ATTENTION, "conv1", "conv", "proj_in"], "text_encoder": TEXT}
    save_lora(folder / "all.safetensors", make, everything, seed=1)
    save_lora(folder / "dora.safetensors", make, {"unet": ATTENTION}, seed=2, use_dora=True)
    save_lora(folder / "other.safetensors", make, {"unet": ["to_q", "to_v"]}, seed=3)
    save_lora(folder / "flux.safetensors", testing.tiny_flux, {"transformer": ATTENTION}, seed=4)
    xl = testing.tiny_stable_diffusion_xl
    save_lora(folder / "xl.safetensors", xl, {"unet": ATTENTION, "text_encoder_2": TEXT}, seed=5)
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return testing.tiny_stable_diffusion()


@pytest.fixture(scope="module")
def bank(pipeline, folder):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder)))
    yield bank
    bank.close()


def asked(name, scale, **more):
    return {"name": f"{name}.safetensors", "scale": scale, **more}


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scales_are_those_of_set_adapters(pipeline, bank, folder, scale):
    plain, whole = generate(pipeline), generate_alone(pipeline, bank, asked("all", 1.0))
    ours = generate_alone(pipeline, bank, asked("all", scale))
    theirs = generate_by_peft(testing.tiny_stable_diffusion, [(folder / "all.safetensors", scale)])
    assert (ours - theirs).abs().max() < EXACT
    assert (ours - whole).abs().max() > 1e-4
    assert torch.equal(generate(pipeline), plain)


@pytest.mark.parametrize(
    ("family", "name", "scale"),
    [
        ("sdxl", "xl", {"unet": {"down": {"block_1": [0.5]}, "mid": 0}, "text_encoder_2": 0.5}),
        ("flux", "flux", {"transformer": {"single_transformer_blocks.0": 0.25}}),
        ("flux", "flux", {"transformer": 0.25}),
    ],
)
def test_scales_of_other_families(folder, family, name, scale):
    make, call = FAMILIES[family]
    pipeline, path = make(), folder / f"{name}.safetensors"
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder)))
    ours = generate_alone(pipeline, bank, asked(name, scale), **call)
    assert (ours - generate_by_peft(make, [(path, scale)], **call)).abs().max() < EXACT
    assert (ours - generate_by_peft(make, [(path, 1.0)], **call)).abs().max() > 1e-5
    bank.close()


def test_scales_of_what_runs_through_peft_and_of_static_loras(pipeline, bank, folder):
    make, scale = testing.tiny_stable_diffusion, {"unet": {"down": 0.3, "mid": 0}}
    # Copies: diffusers takes the components out of a mapping that it finds twice.
    files = [(folder / f"{name}.safetensors", dict(scale)) for name in ("all", "dora")]
    ours = generate_alone(pipeline, bank, [asked("all", scale), asked("dora", scale)])
    assert (ours - generate_by_peft(make, files)).abs().max() < 1e-5
    static = make()
    options = ModelOptions(lora_dir=str(folder), lora_weights=asked("all", scale))
    AdapterBank(static, options).close()
    theirs = generate_by_peft(make, files[:1])
    assert torch.equal(generate(static), theirs)
    fused = make()
    AdapterBank(
        fused,
        ModelOptions(
            lora_dir=str(folder), lora_weights=asked("all", scale), fuse_static_loras=True
        ),
    ).close()
    assert (generate(fused) - theirs).abs().max() < 1e-5


def test_other_scales_of_one_lora_in_one_batch(pipeline, bank):
    """Each has a slot of its own; the attention scale multiplies all of them once more."""
    finds = [asked("all", one) for one in ({"unet": {"down": 0.3}}, 1.0, {"unet": 0})]
    alone = [generate_alone(pipeline, bank, one, seed=7) for one in finds]
    leases = [bank.acquire(bank.prepare(bank.find(one))) for one in finds]
    together = generate_together(pipeline, bank, leases, [7] * 3, ["a red circle"] * 3)
    for lease in leases:
        lease.release()
    for one, image in zip(alone, together, strict=True):
        assert (one[0] - image).abs().max() < 1e-5
    assert bank.report().in_slots.count("all.safetensors") == 1


def test_a_scale_of_zero_everywhere_is_no_lora(pipeline, bank):
    ours = generate_alone(pipeline, bank, asked("other", {"unet": 0}))
    assert torch.equal(ours, generate(pipeline))


@pytest.mark.parametrize(
    ("scale", "field"),
    [
        ({"unett": 1}, r"lora_weights\.scale: got 'unett', expected one of unet.*did you mean"),
        ({"vae": 1}, "lora_weights.scale"),
        ({"unet": {"left": 1}}, r"scale\.unet: got 'left', expected one of down, mid, up"),
        ({"unet": {"down": {"block_9": 1}}}, r"scale\.unet\.down: got 'block_9'"),
        ({"unet": {"up": {"block_0": [1, 2, 3]}}}, r"scale\.unet\.up\.block_0"),
        ({"unet": {"mid": {"block_0": 1}}}, r"scale\.unet\.mid"),
        ({"unet": [1, 2]}, r"scale\.unet"),
        ({"unet": {"down": {"block_0": {"x": 1}}}}, r"scale\.unet\.down\.block_0"),
        ({"text_encoder": {"nowhere": 1}}, r"scale\.text_encoder\.nowhere"),
        ({"unet": 1e9}, r"scale\.unet"),
        ({"unet": "0.5"}, r"scale\.unet"),
        ({"unet": True}, r"scale\.unet"),
        ({"unet": {"down": [float("nan")]}}, r"scale\.unet\.down"),
        ({}, "scale"),
        ({f"x{index}": 1 for index in range(1000)}, "scale"),
    ],
    ids=repr,
)
def test_scales_of_what_is_not_there_are_refused(bank, scale, field):
    with pytest.raises(errors.InvalidRequest, match=field) as caught:
        bank.find(asked("all", scale))
    assert caught.value.field.startswith("lora_weights.scale")


@pytest.mark.parametrize("key", ["scale", "components"])
def test_what_only_a_lora_has_an_embedding_has_not(bank, key):
    with pytest.raises(errors.InvalidRequest, match="only the keys"):
        bank.find(None, {"name": "x.safetensors", key: 1})
    with pytest.raises(errors.InvalidRequest, match="only the keys"):
        bank.find({"name": "all.safetensors", "token": "x"})


def test_scales_are_recorded_and_replayed(folder):
    scale = {"unet": {"down": 0.3, "up": {"block_0": [0.1, 0.9]}}, "text_encoder": 0.5}
    call = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32}
    with Engine(testing.tiny_stable_diffusion(), ModelOptions(lora_dir=str(folder))) as engine:
        result = engine.run(
            "txt2img", **call, seed=1, lora_weights=asked("all", scale), return_workflow=True
        )
        (recorded,) = result.workflow.adapters
        assert recorded.scale == scale
        text = result.workflow.to_json()
        again = engine.replay(type(result.workflow).from_json(text))
        assert again.replay.matches
        assert again.images[0].tobytes() == result.images[0].tobytes()
    # AUTOMATIC1111's text has no word for them, and says none.
    assert "<lora:" not in make_infotext(result.workflow, (32, 32))
    assert "block_0" in dict(summarize(result.workflow))["adapter"]


WAN = {"num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16, "height": 16, "width": 16}
WAN["num_inference_steps"] = 3
generate_wan = functools.partial(generate, **WAN)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_lora(folder / "a.safetensors", tiny_wan, {"transformer": ATTENTION}, seed=1)
    save_lora(folder / "b.safetensors", tiny_wan, {"transformer": ["to_q", "ffn.net.2"]}, seed=2)
    dora = {"transformer": ["to_q"]}
    save_lora(folder / "dora.safetensors", tiny_wan, dora, seed=3, use_dora=True)
    layer = "lycoris_blocks_0_attn1_to_v"
    sides = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(12, 12)}
    save_file({f"{layer}.{key}": one for key, one in sides.items()}, folder / "lokr.safetensors")
    return folder


SECOND = {"load_into_transformer_2": True}


@pytest.mark.parametrize(
    ("loras", "theirs"),
    [
        ([asked("a", 1.0)], [("a", 1.0)]),
        ([asked("a", 0.7, components=["transformer_2"])], [("a", 0.7, SECOND)]),
        (
            [asked("a", 1.0), asked("b", 0.5, components="transformer_2")],
            [("a", 1.0), ("b", 0.5, SECOND)],
        ),
        ([asked("dora", 1.0, components=["transformer_2"])], [("dora", 1.0, SECOND)]),
    ],
    ids=["first", "second", "both", "second by PEFT"],
)
def test_a_lora_of_wan_goes_into_the_denoiser_that_was_asked_for(wan_folder, loras, theirs):
    pipeline = tiny_wan()
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(wan_folder)))
    plain = generate_wan(pipeline)
    ours = generate_alone(pipeline, bank, loras, **WAN)
    files = [(wan_folder / f"{name}.safetensors", *more) for name, *more in theirs]
    assert (ours - generate_by_peft(tiny_wan, files, **WAN)).abs().max() < EXACT
    assert (ours - plain).abs().max() > 1e-5
    assert torch.equal(generate_wan(pipeline), plain)
    bank.close()


def test_one_lora_in_both_denoisers_with_a_scale_for_each(wan_folder):
    pipeline, both = tiny_wan(), ["transformer", "transformer_2"]
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(wan_folder)))
    scale = {"transformer": 0.5, "transformer_2": -1}
    ours = generate_alone(pipeline, bank, asked("a", scale, components=both), **WAN)
    path = wan_folder / "a.safetensors"
    theirs = generate_by_peft(tiny_wan, [(path, 0.5), (path, -1.0, SECOND)], **WAN)
    assert (ours - theirs).abs().max() < EXACT
    bank.close()


@pytest.mark.parametrize("name", ["a", "lokr"])
@pytest.mark.parametrize("how", [{"components": ["transformer_2"]}, SECOND], ids=["ours", "theirs"])
def test_static_loras_of_the_second_denoiser(wan_folder, name, how):
    static, request = tiny_wan(), tiny_wan()
    folder = str(wan_folder)
    AdapterBank(static, ModelOptions(lora_dir=folder, lora_weights=asked(name, 1.0, **how))).close()
    assert static.get_list_adapters().keys() == {"transformer_2"}
    bank = AdapterBank(request, ModelOptions(lora_dir=folder))
    ours = generate_alone(request, bank, asked(name, 1.0, components=["transformer_2"]), **WAN)
    assert (ours - generate_wan(static)).abs().max() < EXACT
    assert (ours - generate_alone(request, bank, asked(name, 1.0), **WAN)).abs().max() > 1e-4
    bank.close()


def test_the_store_knows_the_denoiser(wan_folder, name):
    path = wan_folder / "a.safetensors"
    bentoml_diffusers.import_lora(name, path, components=["transformer_2"])
    bank = AdapterBank(tiny_wan(), ModelOptions())
    for asked_for, expected in (
        (name, {"transformer_2"}),
        ({"name": name, "components": ["transformer"]}, {"transformer"}),
    ):
        ((lora, _),) = bank.prepare(bank.find(asked_for)).loras
        assert {component for component, _ in lora.layers} == expected
    bank.close()


@pytest.mark.parametrize(
    ("make", "components", "match"),
    [
        (tiny_wan, ["transformer_3"], "from transformer, transformer_2"),
        (tiny_wan, [7], "a list of component names"),
        (tiny_wan, ["transformer", "transformer"], "a list of component names"),
        (functools.partial(tiny_wan, two=False), ["transformer_2"], "from transformer"),
        (
            testing.tiny_stable_diffusion,
            ["unet"],
            "files for a StableDiffusionPipeline name their component",
        ),
    ],
)
def test_denoisers_that_are_not_there_are_refused(wan_folder, make, components, match):
    bank = AdapterBank(make(), ModelOptions(lora_dir=str(wan_folder)))
    with pytest.raises(errors.InvalidRequest, match=match) as caught:
        bank.find(asked("a", 1.0, components=components))
    assert caught.value.field == "lora_weights.components"


def test_the_denoiser_is_recorded_and_replayed(wan_folder):
    call = {key: value for key, value in WAN.items() if key != "guidance_scale"}
    loras = [asked("a", 1.0), asked("a", 0.5, components=["transformer_2"])]
    with Engine(tiny_wan(), ModelOptions(lora_dir=str(wan_folder))) as engine:
        given = {"prompt": "a red circle", "output_type": "np", "lora_weights": loras}
        result = engine.run("__call__", **given, **call, seed=1, return_workflow=True)
        assert [one.components for one in result.workflow.adapters] == [[], ["transformer_2"]]
        assert engine.replay(result.workflow).replay.matches
