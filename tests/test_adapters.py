"""Slots: equal to PEFT, mixed in one batch without bleeding, and the base model untouched."""

import logging
import warnings

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
    save_kohya_lora,
    save_lora,
)
from safetensors.torch import save_file

from bentoml_diffusers import ModelOptions, errors, testing
from bentoml_diffusers.adapters import AdapterBank

CONVS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"]
LAYERS = {
    "unet": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks.1.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ],
    "text_encoder": [
        *[f"encoder.layers.0.self_attn.{name}" for name in TEXT],
        "encoder.layers.1.mlp.fc1",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LoRAs of several layouts, ranks and layers for the tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("adapters")
    save_lora(
        folder / "attention.safetensors", testing.tiny_stable_diffusion, {"unet": ATTENTION}, seed=1
    )
    save_lora(
        folder / "wide.safetensors",
        testing.tiny_stable_diffusion,
        {"unet": ["to_q", "to_v", "ff.net.2"]},
        seed=2,
        r=12,
        lora_alpha=6,
        metadata=True,
    )
    save_lora(
        folder / "text.safetensors",
        testing.tiny_stable_diffusion,
        {"unet": ["to_k"], "text_encoder": TEXT},
        seed=3,
    )
    save_lora(
        folder / "conv.safetensors",
        testing.tiny_stable_diffusion,
        {"unet": [*CONVS, "conv", "conv_in"]},
        seed=4,
        r=3,
    )
    save_kohya_lora(folder / "kohya.safetensors", testing.tiny_stable_diffusion, LAYERS, seed=5)
    save_lora(
        folder / "dora.safetensors",
        testing.tiny_stable_diffusion,
        {"unet": ATTENTION},
        seed=6,
        use_dora=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a bias for an incomplete tensor
        options = {"lora_bias": True, "seed": 7}
        save_lora(
            folder / "bias.safetensors",
            testing.tiny_stable_diffusion,
            {"unet": ["to_out.0"]},
            **options,
        )
    return folder


@pytest.fixture
def pipeline():
    return testing.tiny_stable_diffusion()


@pytest.fixture
def bank(pipeline, folder):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder)))
    yield bank
    bank.close()


def file(name):
    return f"{name}.safetensors"


def state_of(pipeline):
    return {
        f"{name}.{key}": value.clone()
        for name in ("unet", "vae", "text_encoder")
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def hooks_of(pipeline):
    return [
        name
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)
        for name, module in part.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


LISTS = [
    [("attention", 1.0)],
    [("wide", 0.7)],
    [("text", 1.0)],
    [("conv", 1.0)],
    [("kohya", 1.0)],
    [("attention", -0.5), ("wide", 1.5), ("conv", 0.3), ("kohya", 2.0)],
]


@pytest.mark.parametrize("loras", LISTS, ids=lambda loras: "+".join(name for name, _ in loras))
def test_a_lone_request_equals_peft(pipeline, bank, folder, loras):
    asked = [{"name": file(name), "scale": scale} for name, scale in loras]
    plain = generate(pipeline)
    ours = generate_alone(pipeline, bank, asked)
    theirs = generate_by_peft(
        testing.tiny_stable_diffusion, [(folder / file(name), scale) for name, scale in loras]
    )
    # The scale multiplies while the product is added, not before: one rounding less than PEFT.
    assert (ours - theirs).abs().max() < 5e-6
    assert (ours - plain).abs().max() > 1e-2
    assert torch.equal(generate(pipeline), plain)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_every_family_equals_peft_alone_and_together(family, tmp_path):
    make, call = FAMILIES[family]
    pipeline = make()
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    save_lora(tmp_path / "one.safetensors", make, {denoiser: ATTENTION}, seed=1)
    targets = {denoiser: ["to_q", "to_out.0"]}
    targets["text_encoder"] = TEXT
    save_lora(tmp_path / "two.safetensors", make, targets, seed=2, r=8)
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path)))
    plain = generate(pipeline, **call)
    asked = [None, "one.safetensors", {"name": "two.safetensors", "scale": 0.6}]
    alone = [generate_alone(pipeline, bank, one, **call)[0] for one in asked]
    for index, loras in ((1, [("one", 1.0)]), (2, [("two", 0.6)])):
        files = [(tmp_path / file(name), scale) for name, scale in loras]
        theirs = generate_by_peft(make, files, **call)[0]
        assert (alone[index] - theirs).abs().max() < 5e-6
        assert (alone[index] - plain[0]).abs().max() > 1e-3
    leases = [bank.acquire(bank.prepare(bank.find(one))) for one in asked]
    together = generate_together(pipeline, bank, leases, [7] * 3, ["a red circle"] * 3, **call)
    # Batched products round otherwise than single ones; far below one 8-bit level, 4e-3.
    assert max((one - other).abs().max() for one, other in zip(alone, together, strict=True)) < 1e-4
    for lease in leases:
        lease.release()
    assert torch.equal(generate(pipeline, **call), plain)
    bank.close()


def test_a_class_without_lora_says_so(folder):
    bank = AdapterBank(FAMILIES["pixart"][0](), ModelOptions(lora_dir=str(folder)))
    with pytest.raises(errors.UnsupportedByPipeline, match="PixArtSigmaPipeline") as caught:
        bank.find("attention.safetensors")
    assert caught.value.error_code == 400


MIX = [
    (None, "a red circle"),
    (["attention.safetensors"], "a blue star"),
    ([{"name": "attention.safetensors", "scale": -0.4}], "the green square"),
    (["wide.safetensors", {"name": "conv.safetensors", "scale": 0.5}], "a red circle"),
    (["kohya.safetensors"], "on the left"),
    (["text.safetensors"], "a blue circle"),
    (None, "a star"),
    ([{"name": "wide.safetensors", "scale": 0}], "a red star"),
]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_eight_requests_in_one_batch_do_not_bleed(pipeline, bank, guidance):
    call = {"guidance_scale": guidance}
    alone = [
        generate_alone(pipeline, bank, loras, prompt=prompt, seed=seed, **call)[0]
        for seed, (loras, prompt) in enumerate(MIX)
    ]
    leases = [bank.acquire(bank.prepare(bank.find(loras))) for loras, _ in MIX]
    together = generate_together(
        pipeline, bank, leases, range(len(MIX)), [prompt for _, prompt in MIX], **call
    )
    worst = max((one - other).abs().max() for one, other in zip(alone, together, strict=True))
    assert worst < 2e-4
    plain = generate(pipeline, prompt=MIX[1][1], seed=1, **call)[0]
    assert (together[1] - plain).abs().max() > 1e-2


def test_the_base_model_is_the_same_after_any_history(pipeline, bank, folder):
    before, plain = state_of(pipeline), generate(pipeline)
    assert not hooks_of(pipeline)
    for loras, prompt in MIX:
        generate_alone(pipeline, bank, loras, prompt=prompt)
    for unet in (pipeline.unet,):
        with pytest.raises(RuntimeError, match="on purpose"), monkey(unet):
            generate_alone(pipeline, bank, "text.safetensors")
    assert torch.equal(generate(pipeline), plain)
    after = state_of(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    bank.close()
    assert not hooks_of(pipeline)
    assert torch.equal(generate(pipeline), plain)


class monkey:
    """Breaks the last layer of a module for a while."""

    def __init__(self, module):
        self.layer = module.conv_out

    def __enter__(self):
        def fail(*args):
            raise RuntimeError("on purpose")

        self.handle = self.layer.register_forward_hook(fail)

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("fused", [False, True])
def test_static_loras_stay_below_those_of_requests(folder, fused):
    pipeline = testing.tiny_stable_diffusion()
    options = ModelOptions(
        lora_dir=str(folder),
        lora_weights=[{"name": "wide.safetensors", "scale": 0.5}],
        fuse_static_loras=fused,
    )
    bank = AdapterBank(pipeline, options)
    static = generate(pipeline)
    only = [(folder / "wide.safetensors", 0.5)]
    assert (static - generate_by_peft(testing.tiny_stable_diffusion, only)).abs().max() < 5e-6
    ours = generate_alone(pipeline, bank, "text.safetensors")
    theirs = generate_by_peft(
        testing.tiny_stable_diffusion, [*only, (folder / "text.safetensors", 1.0)]
    )
    assert (ours - theirs).abs().max() < 5e-6
    assert torch.equal(generate(pipeline), static)
    bank.close()
    assert torch.equal(generate(pipeline), static)


@pytest.mark.parametrize("static", [None, "one.safetensors"])
def test_the_scale_of_attention_kwargs_and_clip_skip(tmp_path, static):
    # SDXL: clip_skip of Stable Diffusion fails in diffusers 0.42 with transformers 5.
    make = FAMILIES["sdxl"][0]
    save_lora(tmp_path / "one.safetensors", make, {"unet": ["to_q"]}, seed=1)
    text = {"unet": ["to_k"], "text_encoder": TEXT, "text_encoder_2": TEXT}
    save_lora(tmp_path / "text.safetensors", make, text, seed=2)
    pipeline = make()
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path), lora_weights=static))
    before = generate(pipeline)
    call = {"cross_attention_kwargs": {"scale": 0.4}, "clip_skip": 1}
    files = [(tmp_path / name, 1.0) for name in (static, "text.safetensors") if name]
    for loras, paths in (("text.safetensors", files), (None, files[:-1])):
        ours = generate_alone(pipeline, bank, loras, **call)
        assert (ours - generate_by_peft(make, paths, **call)).abs().max() < 5e-6
        if paths:
            full = generate_alone(pipeline, bank, loras, clip_skip=1)
            assert (ours - full).abs().max() > 1e-3
    assert (generate(pipeline, clip_skip=1) - before).abs().max() > 1e-3
    assert torch.equal(generate(pipeline), before)
    with pytest.raises(errors.InvalidRequest, match="cross_attention_kwargs"):
        bank.find(None, None, {"cross_attention_kwargs": {"scale": "x"}})
    bank.close()


@pytest.mark.parametrize(("name", "what"), [("dora", "DoRA"), ("bias", "bias")])
def test_what_slots_cannot_express_runs_through_peft(pipeline, bank, folder, caplog, name, what):
    before, plain = state_of(pipeline), generate(pipeline)
    with caplog.at_level(logging.INFO, logger="bentoml_diffusers"):
        for _ in range(2):
            ours = generate_alone(pipeline, bank, [file(name), "attention.safetensors"])
    assert caplog.text.count(what) == 1
    files = [(folder / file(one), 1.0) for one in (name, "attention")]
    assert torch.equal(ours, generate_by_peft(testing.tiny_stable_diffusion, files))
    assert (ours - generate_by_peft(testing.tiny_stable_diffusion, files[1:])).abs().max() > 1e-3
    assert torch.equal(generate(pipeline), plain)
    after = state_of(pipeline)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


PLACES = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "conv": "down_blocks.0.resnets.0.conv1",
}


def lycoris_parts(kind, weight, random):
    """Matrices of a LoHa or LoKr and the change of the weight that they mean, by its formula."""

    def draw(*shape):
        return torch.randn(*shape, generator=random) * 0.8

    outputs, inputs = weight.shape[0], weight[0].numel()
    if kind == "loha":
        parts = {
            "hada_w1_a": draw(outputs, 3),
            "hada_w1_b": draw(3, inputs),
            "hada_w2_a": draw(outputs, 3),
            "hada_w2_b": draw(3, inputs),
        }
        one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        return {**parts, "alpha": torch.tensor(1.5)}, (one * two) * (1.5 / 3)
    small = draw(2, 4)
    if kind == "lokr_full":
        large = draw(outputs // 2, inputs // 4)
        return {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(9.0)}, torch.kron(
            small, large
        )
    down, up = draw(outputs // 2, 2), draw(2, inputs // 4)
    parts = {"lokr_w1": small, "lokr_w2_a": down, "lokr_w2_b": up, "alpha": torch.tensor(1.0)}
    return parts, torch.kron(small, down @ up) * 0.5


@pytest.mark.parametrize("static", [None, "wide.safetensors"])
@pytest.mark.parametrize(
    ("kind", "place"),
    [("loha", "linear"), ("loha", "conv"), ("lokr_full", "linear"), ("lokr", "linear")],
)
def test_loha_and_lokr_run_through_peft(folder, tmp_path, kind, place, static):
    pipeline, reference = testing.tiny_stable_diffusion(), testing.tiny_stable_diffusion()
    path = PLACES[place]
    weight = reference.unet.get_submodule(path).weight
    parts, change = lycoris_parts(kind, weight, torch.Generator().manual_seed(3))
    layer = f"lora_unet_{path.replace('.', '_')}"
    (tmp_path / "wide.safetensors").write_bytes((folder / "wide.safetensors").read_bytes())
    save_file({f"{layer}.{key}": part for key, part in parts.items()}, tmp_path / "x.safetensors")
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(tmp_path), lora_weights=static))
    before, plain = state_of(pipeline), generate(pipeline)
    ours = generate_alone(pipeline, bank, [{"name": "x.safetensors", "scale": 0.7}])
    with torch.no_grad():
        weight += 0.7 * change.view(weight.shape)
    if static:
        reference.load_lora_weights(str(folder / static))
    # The change is added to the outputs, here to the weights.
    assert (ours - generate(reference)).abs().max() < 2e-5
    assert (ours - plain).abs().max() > 1e-3
    after = state_of(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(generate(pipeline), plain)
    bank.close()


def test_slots_are_bounded_and_the_least_recently_used_makes_room(pipeline, folder):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(folder), lora_slots=2))

    def acquire(name):
        return bank.acquire(bank.prepare(bank.find(file(name))))

    one, two = acquire("attention"), acquire("wide")
    with pytest.raises(errors.AdaptersBusy, match="lora_slots=2") as caught:
        acquire("conv")
    assert caught.value.error_code == 503
    again = acquire("attention")
    one.release()
    one.release()
    two.release()
    assert bank.report().in_slots == ("wide.safetensors", "attention.safetensors")
    acquire("conv").release()
    assert bank.report().in_slots == ("attention.safetensors", "conv.safetensors")
    with pytest.raises(errors.InvalidRequest, match="at most 2"):
        bank.find([file(name) for name in ("attention", "wide", "conv")])
    again.release()
    # What a slot held before leaves nothing in it.
    for name in ("wide", "text", "attention", "kohya", "conv"):
        ours = generate_alone(pipeline, bank, file(name))
        theirs = generate_by_peft(testing.tiny_stable_diffusion, [(folder / file(name), 1.0)])
        assert (ours - theirs).abs().max() < 5e-6
    bank.close()


@pytest.mark.slow
def test_a_compiled_denoiser_is_compiled_for_shapes_and_not_for_loras(tmp_path):
    from torch._dynamo.testing import CompileCounter

    make, _ = FAMILIES["flux"]
    for index in range(4):
        path = tmp_path / f"l{index}.safetensors"
        save_lora(path, make, {"transformer": ATTENTION[: 4 - index % 2]}, seed=index, r=2 + index)
    pipeline, eager = make(), make()
    counter = CompileCounter()
    pipeline.transformer.compile(backend=counter)
    options = ModelOptions(lora_dir=str(tmp_path), max_lora_rank=8, lora_slots=3)
    banks = [AdapterBank(pipeline, options), AdapterBank(eager, options)]
    random = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, 4, 16, generator=random),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=random),
        "pooled_projections": torch.randn(2, 16, generator=random),
        "timestep": torch.tensor([0.5, 0.5]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(6, 3),
    }

    @torch.no_grad()
    def run(bank, transformer, names):
        leases = [name and bank.acquire(bank.prepare(bank.find(name))) for name in names]
        shares = [(lease, 1) for lease in leases]
        with bank.forwarding("transformer", shares if len(shares) > 1 else [(leases[0], None)]):
            result = transformer(**given)[0]
        for lease in filter(None, leases):
            lease.release()
        return result

    def check(*names):
        ours = run(banks[0], pipeline.transformer, names)
        theirs = run(banks[1], eager.transformer, names)
        assert (ours - theirs).abs().max() < 1e-5
        return counter.frame_count

    plain = check(None)
    lone = check("l0.safetensors")
    mixed = check("l0.safetensors", None)
    assert plain == 1
    assert lone > plain
    assert mixed > lone
    for index in range(1, 4):
        name = f"l{index}.safetensors"
        check({"name": name, "scale": 0.3 * index})
        check(None, {"name": name, "scale": -1.5})
        check(name, "l0.safetensors")
    assert check(None) == mixed
