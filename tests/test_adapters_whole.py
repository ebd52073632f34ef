"""A LoRA file is applied as PEFT would, and whole, or the result says what was left out."""

import json

import diffusers
import pytest
import torch
from adapter_models import (
    ATTENTION,
    CALL,
    TEXT,
    edit,
    generate,
    generate_alone,
    generate_by_peft,
    save_kohya_lora,
    save_lora,
    tiny_z_image,
)
from lora_layouts import LOKR, WHOLE_LOKR, shape_of
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from bentoml_diffusers import Engine, ModelOptions, errors, testing
from bentoml_diffusers._compat import reads_lokr
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.adapters.coverage import layers_of
from bentoml_diffusers.adapters.patterns import Patterns

MAKE = testing.tiny_stable_diffusion
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"
PATHS = [f"{LAYER}.to_q", f"{LAYER}.to_out.0", "up_blocks.1.attentions.0.proj_in", "conv_in"]


@pytest.fixture
def lora(tmp_path):
    return save_lora(tmp_path / "a.safetensors", MAKE, {"unet": ATTENTION, "text_encoder": TEXT})


def bank_of(folder, pipeline=None, **options):
    return AdapterBank(pipeline or MAKE(), ModelOptions(lora_dir=str(folder), **options))


def prepare(folder, name="a.safetensors", pipeline=None, **options):
    bank = bank_of(folder, pipeline, **options)
    return bank.prepare(bank.find(name))


@pytest.mark.parametrize(
    "keys",
    [
        ["to_q", f"{LAYER}.to_q"],
        [f"^{LAYER}.to_q", "to_q"],
        [r".*attn1.*", "to_out.0"],
        ["to_out.0", r".*attn1.*"],
        [r"^up_blocks\..*", r"(down|up)_blocks.1.*proj_in"],
        ["o_q", "attn1", "0"],
        [r"^mid.*to_[qk]", rf"{LAYER}.to_q"],
        ["^to_q", "^conv_in"],
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_patterns_match_as_those_of_peft(keys, path):
    values = {key: index for index, key in enumerate(keys)}
    assert Patterns(values).find(path, None) == values.get(get_pattern_key(keys, path))


def test_alphas_by_pattern_are_those_of_peft(lora):
    about = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.target_modules": ATTENTION,
        "unet.alpha_pattern": {r"^down_blocks.*to_q": 0.5, r"^up_blocks\..*": 0.5, "to_q": 2},
    }
    tensors = {key: value for key, value in load_file(lora).items() if key.startswith("unet")}
    save_file(tensors, lora, metadata={"lora_adapter_metadata": json.dumps(about)})
    pipeline = MAKE()
    ours = generate_alone(pipeline, bank_of(lora.parent, pipeline), lora.name)
    assert (ours - generate_by_peft(MAKE, [(lora, 1.0)])).abs().max() < 5e-6
    about["unet.rank_pattern"] = {r"mid_block.*": 2}
    save_file(tensors, lora, metadata={"lora_adapter_metadata": json.dumps(about)})
    with pytest.raises(
        errors.InvalidModel, match=r"give rank 2 for mid_block.*, but it has rank 4"
    ):
        prepare(lora.parent)


def lycoris(folder):
    torch.manual_seed(0)
    key = f"lora_unet_{LAYER.replace('.', '_')}_to_"
    lokr = {f"{key}v.lokr_w1": torch.randn(4, 4), f"{key}v.lokr_w2": torch.randn(4, 4)}
    shapes = {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2), "w2_b": (2, 16)}
    loha = {f"{key}q.hada_{part}": torch.randn(shape) for part, shape in shapes.items()}
    for name, tensors in {"lokr": lokr, "loha": loha, "both": {**loha, **lokr}}.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_loha_and_lokr_in_one_file_are_both_applied(tmp_path):
    lycoris(tmp_path)
    pipeline = MAKE()
    bank, plain = bank_of(tmp_path, pipeline), generate(pipeline)
    apart = generate_alone(pipeline, bank, ["loha.safetensors", "lokr.safetensors"])
    both = generate_alone(pipeline, bank, "both.safetensors")
    assert torch.equal(both, apart)
    for name in ("loha.safetensors", "lokr.safetensors"):
        assert (generate_alone(pipeline, bank, name) - both).abs().max() > 1e-3
    assert torch.equal(generate(pipeline), plain)
    static = MAKE()
    bank_of(tmp_path, static, lora_weights="both.safetensors")
    assert torch.equal(generate(static), both)


@pytest.mark.parametrize("ends", [WHOLE_LOKR, LOKR], ids=["whole", "factored"])
def test_lokr_of_ai_toolkit_for_z_image_makes_the_image_of_diffusers(ends, tmp_path):
    random, tensors = torch.Generator().manual_seed(1), {}
    for layer in ("attention.to_q", "attention.to_v", "attention.to_out.0"):
        for end in ends:
            tensor = torch.randn(shape_of(end, [32], 32), generator=random)
            key = f"diffusion_model.layers.0.{layer}.{end}"
            tensors[key] = torch.tensor(4.0) if end == "alpha" else tensor
    save_file(tensors, tmp_path / "z.safetensors")
    call = {**CALL, "prompt_embeds": [torch.randn(5, 16, generator=random)], "guidance_scale": 0.0}

    def generate(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return torch.as_tensor(pipeline(generator=torch.Generator().manual_seed(7), **call).images)

    theirs, ours = tiny_z_image(), tiny_z_image()
    if not reads_lokr(ours):
        pytest.skip(f"diffusers {diffusers.__version__} reads none for Z-Image")
    plain = generate(ours)
    theirs.load_lora_weights(tmp_path / "z.safetensors")
    expected = generate(theirs)
    assert (expected - plain).abs().max() > 0.1
    with Engine(ours, ModelOptions(lora_dir=str(tmp_path))) as engine:
        result = engine.run("__call__", seed=7, lora_weights="z.safetensors", **call)
    assert torch.equal(torch.as_tensor(result.output[0]), expected)
    assert torch.equal(generate(ours), plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_files_of_eight_bits_are_taken(lora, dtype):
    edit(lora, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    pipeline = MAKE()
    ours = generate_alone(pipeline, bank_of(lora.parent, pipeline), lora.name)
    assert (ours - generate_by_peft(MAKE, [(lora, 1.0)])).abs().max() < 5e-6
    assert (ours - generate(pipeline)).abs().max() > 1e-2

    def poison(tensors):
        return {key: (value.float() * float("nan")).to(dtype) for key, value in tensors.items()}

    edit(lora, poison)
    with pytest.raises(errors.InvalidModel, match="NaN"):
        prepare(lora.parent)


def without_prefix(tensors):
    return {key.removeprefix("unet.") if ".to_k." in key else key: tensors[key] for key in tensors}


def other_component(tensors):
    return {key.replace("text_encoder.", "text_encoder_3."): tensors[key] for key in tensors}


def unknown_part(tensors):
    return {**tensors, "image_encoder.layer.lora_A.weight": torch.ones(4, 4)}


PARTIAL = {without_prefix: "8 of its 40", other_component: "8 of its 40", unknown_part: "1 of its"}


@pytest.mark.parametrize("change", PARTIAL, ids=lambda change: change.__name__)
@pytest.mark.parametrize("about", [None, {"ss_network_dim": "4"}])
def test_a_file_of_which_a_part_fits_is_refused_or_the_result_says_so(lora, change, about):
    tensors = change(load_file(lora))
    save_file(tensors, lora, metadata=about)
    with pytest.raises(errors.InvalidModel, match=PARTIAL[change]) as caught:
        prepare(lora.parent)
    assert caught.value.error_code == 400
    assert "allow_partial_lora" in str(caught.value)
    with pytest.raises(errors.InvalidModel, match=PARTIAL[change]):
        bank_of(lora.parent, lora_weights=lora.name)
    with Engine(MAKE(), ModelOptions(lora_dir=str(lora.parent), allow_partial_lora=True)) as engine:
        result = engine.run("__call__", prompt="a", lora_weights=lora.name, **CALL)
        again = engine.run("__call__", prompt="a", lora_weights=lora.name, **CALL)
    assert [PARTIAL[change] in warning for warning in result.warnings] == [True]
    assert again.warnings == result.warnings
    bank_of(lora.parent, lora_weights=lora.name, allow_partial_lora=True)


def test_kohya_files_with_a_second_text_encoder_do_not_fit_stable_diffusion(tmp_path):
    path = save_kohya_lora(tmp_path / "a.safetensors", MAKE, {"unet": [f"{LAYER}.to_q"]})
    more = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    ends = {"lora_down.weight": torch.ones(4, 8), "lora_up.weight": torch.ones(8, 4)}
    edit(path, lambda tensors: {**tensors, **{f"{more}.{end}": ends[end] for end in ends}})
    with pytest.raises(errors.InvalidModel, match=f"1 of its 2 layers.*{more}"):
        prepare(tmp_path)


def test_what_is_for_a_component_that_a_pipeline_is_without_is_left_out(lora):
    pipeline = MAKE()
    pipeline.register_modules(text_encoder=None)
    found = prepare(lora.parent, pipeline=pipeline)
    assert "8 of its 40 layers are not in the base model" in found.warnings[0]
    ((lora_here, _),) = found.loras
    assert {component for component, _ in lora_here.layers} == {"unet"}


def test_a_dora_with_a_layer_that_is_not_there_is_refused(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", MAKE, {"unet": ["to_q"]}, use_dora=True)
    edit(
        path,
        lambda tensors: {
            key.replace("mid_block", "mid_block_9"): value for key, value in tensors.items()
        },
    )
    with pytest.raises(errors.InvalidModel, match=r"no layer unet\.mid_block_9"):
        prepare(tmp_path)


def test_layers_are_counted_in_every_way_that_their_tensors_are_named():
    ends = [
        "lora_A.weight",
        "lora_B.bias",
        "lora_down.weight",
        "alpha",
        "hada_w1_a",
        "lokr_w2",
        "lora.up.weight",
        "diff_b",
        "dora_scale",
        "weight",
    ]
    assert layers_of(f"a.b_1.to_q.{end}" for end in ends) == ["a.b_1.to_q"]
    assert layers_of(["a.to_q_lora.down.weight"]) == ["a.to_q"]
