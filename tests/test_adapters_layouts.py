"""Every layout of LoRA files that diffusers reads is read here with the same result.

The denoiser is made of just the layers that diffusers' converter names, so each family costs
milliseconds; LoRAs of UNets are read for real ones.
"""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders import PeftAdapterMixin, lora_conversion_utils, lora_pipeline
from diffusers.models.modeling_utils import ModelMixin
from lora_layouts import LAYOUTS
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from bentoml_diffusers import errors, testing
from bentoml_diffusers.adapters.layers import LayerMap
from bentoml_diffusers.adapters.lora import LoraSwitch
from bentoml_diffusers.adapters.reading import convert_lora
from bentoml_diffusers.adapters.reasons import explain
from bentoml_diffusers.adapters.sources import Adapter

# Of BFL's control LoRAs, which write to the base: test_adapters_files.py has them.
REFUSED_CONVERTERS = {"_convert_bfl_flux_control_lora_to_diffusers"}


class Branch(torch.nn.Module):
    """Of a path; numbers in it are indices, as of a list."""

    def __getitem__(self, index):
        return self._modules[str(index)]


class Denoiser(ModelMixin, PeftAdapterMixin):
    """Layers at given paths, which take LoRAs as those of diffusers' models do."""

    config = SimpleNamespace(image_dim=None, in_channels=8)

    def __init__(self, layers=()):
        super().__init__()
        for path, (inputs, outputs) in {"other": (1, 1), **dict(layers)}.items():
            *parents, last = path.split(".")
            parent = self
            for name in parents:
                if name not in parent._modules:
                    parent.add_module(name, Branch())
                parent = parent._modules[name]
            parent.add_module(last, torch.nn.Linear(inputs, outputs))


def class_with(mixin):
    """Returns a pipeline class of diffusers that loads LoRAs by a mixin: one of its name if any."""
    own = mixin.__name__.replace("LoraLoaderMixin", "Pipeline")
    for name in sorted(dir(diffusers), key=lambda name: (name != own, name)):
        try:
            cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        except RuntimeError:  # its packages are not installed
            continue
        if isinstance(cls, type) and mixin in cls.__mro__ and "lora_state_dict" not in vars(cls):
            return cls
    raise LookupError(mixin)


def save(path, tensors, about=None):
    """Writes a file; safetensors takes no tensors that share memory."""
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=about)


def pipeline_for(layout, path):
    """Returns a pipeline with just the layers that diffusers finds in a file."""
    if layout.real is not None:
        return layout.real()
    cls = class_with(layout.mixin)
    answer = cls.lora_state_dict(path)
    state = answer[0] if isinstance(answer, tuple) else answer
    sizes = {}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        for end, axis in {".lora_A.weight": 1, ".lora_B.weight": 0}.items():
            if rest.endswith(end):
                layers = sizes.setdefault(component, {})
                layers.setdefault(rest.removesuffix(end), [0, 0])[1 - axis] = tensor.shape[axis]
        if ".lokr_" in rest:
            sizes.setdefault(component, {})[rest.partition(".lokr_")[0]] = (8, 12)
    parts = {name: Denoiser(sizes.get(name, {})) for name in cls._lora_loadable_modules}
    if "text_encoder" in sizes:
        parts["text_encoder"] = testing.tiny_flux().text_encoder
    parts.pop("transformer_ref", None)
    return bare(cls, parts)


def bare(cls, components):
    """Returns a pipeline with these components only; its class needs no config for them."""
    own = {"components": components, "_execution_device": torch.device("cpu"), "hf_device_map": {}}
    pipeline = object.__new__(type(cls.__name__, (cls,), {**own, "dtype": torch.float32}))
    pipeline.__dict__.update(components)
    return pipeline


def deltas(pipeline, adapter):
    """Returns what an adapter of PEFT adds to the weights of each layer."""
    return {
        (component, path): layer.get_delta_weight(adapter)
        for component, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for path, layer in part.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def deltas_of(raw, pipeline):
    """Returns what slots add to the weights of each layer."""
    parts = pipeline.components
    return {
        (component, path): (lora.factor * (lora.up.flatten(1) @ lora.down.flatten(1))).reshape(
            parts[component].get_submodule(path).weight.shape
        )
        for component, loras in raw.layers.items()
        for path, lora in loras.items()
    }


@pytest.fixture
def called(monkeypatch):
    """Names of diffusers' converters that were called."""
    names = set()

    def noted(name, convert):
        return lambda *args, **given: (names.add(name), convert(*args, **given))[1]

    for name in converters():
        if hasattr(lora_pipeline, name):
            monkeypatch.setattr(lora_pipeline, name, noted(name, getattr(lora_pipeline, name)))
    return names


def converters():
    kinds = ("_convert_", "_maybe_map_")
    return {name for name in vars(lora_conversion_utils) if name.startswith(kinds)}


def full_name(converter):
    return converter if converter.startswith("_") else f"_convert_{converter}_to_diffusers"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_files_are_read_as_diffusers_reads_them(layout, tmp_path, called):
    path = tmp_path / "x.safetensors"
    save(path, layout.tensors(), layout.about or None)
    pipeline = pipeline_for(layout, path)
    called.clear()
    raw = convert_lora(pipeline, LayerMap(pipeline), "x", path)
    # LoKr by the names of the layers is read without a converter.
    assert called == {full_name(name) for name in layout.converters} or raw.beyond_slots
    assert raw.left_out is None
    theirs = pipeline_for(layout, path)
    theirs.load_lora_weights(str(path), adapter_name="x")
    expected = deltas(theirs, "x")
    if raw.beyond_slots is None:
        found = deltas_of(raw, pipeline)
    else:
        adapter = Adapter("x", str(path), 1.0)
        with LoraSwitch(pipeline).applied([adapter]):
            found = deltas(pipeline, *pipeline.transformer.peft_config)
    assert found.keys() == expected.keys()
    assert expected
    for key, delta in expected.items():
        torch.testing.assert_close(found[key], delta)
        assert delta.abs().max() > 0


def test_every_converter_of_diffusers_has_its_layout():
    """A new converter of diffusers, or a class that reads files in its own way, needs a row."""
    known = {full_name(name) for layout in LAYOUTS for name in layout.converters}
    inner = {"_convert_unet_lora_key", "_convert_text_encoder_lora_key"}  # parts of others
    assert converters() - inner - known == set(REFUSED_CONVERTERS)
    classes = [cls for cls in vars(lora_pipeline).values() if isinstance(cls, type)]
    readers = {cls for cls in classes if "lora_state_dict" in vars(cls)}
    assert readers - {lora_pipeline.LoraBaseMixin} == {layout.mixin for layout in LAYOUTS}


def read(pipeline, tensors, path, **given):
    save(path, tensors)
    return convert_lora(pipeline, LayerMap(pipeline), "x", path, **given)


def layout_of(name):
    return next(layout for layout in LAYOUTS if layout.name == name)


@pytest.fixture
def flux(tmp_path):
    """A pipeline for kohya's layout for Flux, the tensors of a file, and where to write one."""
    layout, path = layout_of("flux-kohya"), tmp_path / "x.safetensors"
    save(path, layout.tensors())
    return pipeline_for(layout, path), layout.tensors(), path


MORE = {
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("lora_down.weight", "lora_up.weight"),
    "text_encoders.t5xxl.transformer.encoder.q": ("lora_down.weight", "lora_up.weight"),
    "lora_unet_double_blocks_0_img_attn_proj_2": ("diff_b",),
    "lora_unet_double_blocks_0.norm": ("diff",),
    "lora_te1_text_projection": ("lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("layer", MORE)
def test_what_diffusers_leaves_out_of_a_file_for_flux_is_said(flux, layer):
    pipeline, tensors, path = flux
    more = {f"{layer}.{end}": torch.ones(4, 4) for end in MORE[layer]}
    with pytest.raises(errors.InvalidModel, match=rf"1 of its \d+ layers.* such as {layer}"):
        read(pipeline, {**tensors, **more}, path)
    partial = read(pipeline, {**tensors, **more}, path, allow_partial=True)
    assert partial.left_out.layers == (layer,)
    plain = read(pipeline, tensors, path)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in more.items()}
    for raw in (partial, read(pipeline, {**tensors, **zeros}, path)):
        torch.testing.assert_close(deltas_of(raw, pipeline), deltas_of(plain, pipeline))
    assert raw.left_out is None


def test_names_that_no_converter_knows_are_refused(flux):
    pipeline, tensors, path = flux
    ends = ("lora_down.weight", "lora_up.weight")
    lost = {f"lora_unet_nowhere.{end}": torch.ones(4, 4) for end in ends}
    with pytest.raises(errors.InvalidModel, match="lora_unet_nowhere"):
        read(pipeline, {**tensors, **lost}, path)


def test_a_third_text_encoder_of_sd3_takes_no_lora(tmp_path):
    layout, path = layout_of("SD3"), tmp_path / "x.safetensors"
    save(path, layout.tensors())
    pipeline = pipeline_for(layout, path)
    more = {
        f"text_encoder_3.q.{end}": torch.ones(4, 4) for end in ("lora_A.weight", "lora_B.weight")
    }
    with pytest.raises(errors.InvalidModel, match=r"1 of its 7 layers.*text_encoder_3\.q"):
        read(pipeline, {**layout.tensors(), **more}, path)


def test_lokr_for_fused_projections_of_flux_2_does_not_change_the_base(tmp_path):
    blocks = {"transformer_blocks.0.attn.to_q": (8, 12)}
    pipeline = bare(diffusers.Flux2Pipeline, {"transformer": Denoiser(blocks)})
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(18, 4)}
    before = set(pipeline.transformer.state_dict())
    with pytest.raises(errors.InvalidModel, match=r"fused projections.*attn\.to_qkv"):
        read(pipeline, tensors, tmp_path / "x.safetensors")
    assert set(pipeline.transformer.state_dict()) == before
    fused = bare(
        diffusers.Flux2Pipeline,
        {"transformer": Denoiser({"transformer_blocks.0.attn.to_qkv": (8, 36)})},
    )
    assert read(fused, tensors, tmp_path / "x.safetensors").beyond_slots == "LoKr"


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_an_alpha_that_makes_diffusers_run_forever_is_refused(flux, alpha):
    pipeline, tensors, path = flux
    key = next(key for key in tensors if key.endswith("alpha"))
    with pytest.raises(errors.InvalidModel, match=f"{key}.*not positive"):
        read(pipeline, {**tensors, key: torch.tensor(alpha)}, path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\n lines of /srv/x"), "two lines of x"),
        (KeyError("up"), "what belongs to its other tensors is missing: 'up'"),
        (IndexError("list index out of range"), "its keys are in no layout"),
        (AssertionError(), "its keys are in no layout"),
        (ValueError("x" * 999), "x" * 600 + "..."),
    ],
)
def test_reasons_are_of_the_file(error, reason):
    assert explain(error, "/srv/x", "x").startswith(reason)
