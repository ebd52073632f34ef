"""Adapters on weights that are stored otherwise than they are computed with."""

import warnings

import pytest
import torch
from adapter_models import ATTENTION, generate, generate_alone, save_lora
from safetensors.torch import save_file

from bentoml_diffusers import ModelOptions, errors, testing
from bentoml_diffusers.adapters import AdapterBank

MAKE = testing.tiny_stable_diffusion
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"


class PackedLinear(torch.nn.Linear):
    """Two numbers of four bits in a byte, as bitsandbytes and GGUF have them."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.bias = layer.bias
        self.scale = layer.weight.abs().max() / 7
        numbers = (layer.weight / self.scale).round().add(8).flatten().to(torch.uint8)
        packed = (numbers[::2] * 16 + numbers[1::2]).reshape(-1, 1)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def dequantize(self):
        numbers = torch.stack([self.weight // 16, self.weight % 16], dim=-1).flatten()
        return (numbers.float() - 8).mul(self.scale).reshape(self.out_features, self.in_features)

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.dequantize(), self.bias)


def pack(pipeline):
    for name, layer in list(pipeline.unet.named_modules()):
        if isinstance(layer, torch.nn.Linear) and ".attn" in name:
            parent, _, child = name.rpartition(".")
            setattr(pipeline.unet.get_submodule(parent), child, PackedLinear(layer))


def cast(pipeline):
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def by_torchao(pipeline):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipeline.unet, quantization.Int8WeightOnlyConfig())


def by_quanto(pipeline):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(pipeline.unet, weights=quanto.qint8)
    quanto.freeze(pipeline.unet)


def build(quantize, dequantized=False):
    """The model, or one of plain weights that holds the numbers of the quantized one."""
    pipeline = MAKE()
    quantize(pipeline)
    if not dequantized:
        return pipeline
    plain = MAKE()
    for name, layer in pipeline.unet.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is None:
            continue
        source = layer if isinstance(layer, PackedLinear) else weight
        numbers = source.dequantize() if hasattr(type(source), "dequantize") else weight
        with torch.no_grad():
            plain.unet.get_submodule(name).weight.copy_(numbers.to(torch.float32))
            if getattr(layer, "bias", None) is not None:
                plain.unet.get_submodule(name).bias.copy_(layer.bias.to(torch.float32))
    return plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    save_lora(folder / "lora.safetensors", MAKE, {"unet": ATTENTION}, seed=1)
    save_lora(folder / "dora.safetensors", MAKE, {"unet": ["to_q"]}, seed=2, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a bias for an incomplete tensor
        biased = {"seed": 3, "lora_bias": True}
        save_lora(folder / "bias.safetensors", MAKE, {"unet": ["to_out.0"]}, **biased)
    random = torch.Generator().manual_seed(3)
    shape = MAKE().unet.get_submodule(LAYER).weight.shape
    half = [side // 2 for side in shape]
    loha = {
        "w1_a": (shape[0], 2),
        "w1_b": (2, shape[1]),
        "w2_a": (shape[0], 2),
        "w2_b": (2, shape[1]),
    }
    for kind, parts in (
        ("lokr", {"lokr_w1": (2, 2), "lokr_w2": half}),
        ("loha", {f"hada_{part}": sides for part, sides in loha.items()}),
    ):
        tensors = {
            f"{KOHYA}.{part}": torch.randn(*sides, generator=random)
            for part, sides in parts.items()
        }
        save_file(tensors, folder / f"{kind}.safetensors")
    return folder


def options(folder, **more):
    return ModelOptions(lora_dir=str(folder), **more)


KINDS = [cast, pack, by_torchao, by_quanto]


@pytest.mark.parametrize("name", ["lora", "lokr", "loha"])
@pytest.mark.parametrize("quantize", KINDS)
def test_what_fits_is_what_the_plain_weights_make(folder, quantize, name):
    if quantize is pack and name != "lora":
        pytest.skip("refused, see below")
    quantized, plain = build(quantize), build(quantize, dequantized=True)
    before, path = generate(quantized), f"{name}.safetensors"
    banks = [AdapterBank(one, options(folder)) for one in (quantized, plain)]
    ours = generate_alone(quantized, banks[0], path)
    theirs = generate_alone(plain, banks[1], path)
    assert (ours - theirs).abs().max() < 1e-5  # products of quantized weights round otherwise
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(generate(quantized), before)
    for bank in banks:
        bank.close()


@pytest.mark.parametrize(
    ("quantize", "name", "match"),
    [
        (pack, "lokr", r"is a LoKr, which PEFT cannot apply.*unet\.mid_block.*uint8"),
        (pack, "loha", "is a LoHa, which PEFT cannot apply"),
        (by_torchao, "bias", "not a LoRA for StableDiffusionPipeline.*does not support lora_bias"),
        (cast, "dora", "would be rounded to float8_e4m3fn.*layerwise_casting"),
    ],
)
@pytest.mark.parametrize("is_static", [False, True], ids=["request", "static"])
def test_what_does_not_fit_says_why(folder, quantize, name, match, is_static):
    pipeline, path = build(quantize), f"{name}.safetensors"
    before = generate(pipeline)
    static = {"lora_weights": path} if is_static else {}

    def use():
        bank = AdapterBank(pipeline, options(folder, **static))
        generate_alone(pipeline, bank, path)

    with pytest.raises(errors.InvalidModel, match=match) as caught:
        use()
    assert "another base model" not in str(caught.value)
    if not is_static:
        assert torch.equal(generate(pipeline), before)


def test_a_static_lora_is_not_rounded_in_silence(folder):
    with pytest.raises(errors.InvalidModel, match="would be rounded to float8_e4m3fn"):
        AdapterBank(build(cast), options(folder, lora_weights="lora.safetensors"))


@pytest.mark.parametrize(
    ("quantize", "name", "storage"),
    [
        (cast, "lokr", "float8_e4m3fn"),
        (pack, "lora", "uint8"),
        (by_torchao, "lora", "Int8Tensor"),
        (by_torchao, "lokr", "Int8Tensor"),
        (by_quanto, "lora", "WeightQBytesTensor"),
    ],
)
def test_nothing_is_fused_with_quantized_weights(folder, quantize, name, storage):
    chosen = options(folder, lora_weights=f"{name}.safetensors", fuse_static_loras=True)
    with pytest.raises(errors.InvalidOption, match=f"fuse_static_loras.*{storage}"):
        AdapterBank(build(quantize), chosen)


@pytest.mark.parametrize("lora_weights", [None, "lora.safetensors"])
def test_fused_loras_have_no_scale_that_a_request_could_change(folder, lora_weights):
    pipeline = MAKE()
    chosen = options(folder, lora_weights="lokr.safetensors", fuse_static_loras=True)
    bank = AdapterBank(pipeline, chosen)
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(errors.InvalidRequest, match="fused") as caught:
        bank.find(lora_weights, None, scaled)
    assert caught.value.field == "cross_attention_kwargs.scale"
    assert bank.find(lora_weights, None, {"cross_attention_kwargs": {"scale": 1}}).layer_scale == 1
    bank.close()
