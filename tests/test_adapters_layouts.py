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
from lora_layouts import DOTTED, KOHYA, LAYOUTS, by_stability, shape_of
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from bentoml_diffusers import errors, testing
from bentoml_diffusers._compat import reads_lokr
from bentoml_diffusers.adapters.coverage import layer_of, layers_of
from bentoml_diffusers.adapters.layers import LayerMap
from bentoml_diffusers.adapters.lora import LoraSwitch
from bentoml_diffusers.adapters.reader import convert_lora
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


def anime_z():
    """Returns Z-Image's attention apart, and what the trainer Anime-Z writes besides: fused."""
    apart = layout_of("z-image-twice").tensors()
    more = {}
    for block in ("diffusion_model.layers.0.attention", "diffusion_model.layers.1.attention"):
        names = [f"{block}.to.{one}.lora" for one in "qkv"]
        more[f"{block}.qkv.lora.down.weight"] = torch.cat(
            [apart[f"{n}.down.weight"] for n in names]
        )
        up = torch.block_diag(*(apart[f"{name}.up.weight"] for name in names))
        more[f"{block}.qkv.lora.up.weight"] = up
        for end in DOTTED[:2]:
            more[f"{block}.out.{end}"] = apart[f"{block}.to_out.0.{end}"]
    return "z-image-twice", apart, more


def sdxl_of_two_programs():
    """Returns layers of SDXL by the names of diffusers, and again by those of Stability."""
    apart, more = layout_of("sdxl-kohya").tensors(), {}
    for path, _ in testing.tiny_stable_diffusion_xl().unet.named_modules():
        layer, other = (
            f"lora_unet_{name.replace('.', '_')}" for name in (path, by_stability(path))
        )
        if layer != other and f"{layer}.alpha" in apart:
            more.update({f"{other}.{end}": apart[f"{layer}.{end}"] for end in KOHYA})
    return "sdxl-kohya", apart, more


def flux_in_two_layouts():
    """Returns fused layers of Flux by kohya's names, and what diffusers itself writes for them."""
    layout, fused = layout_of("flux-kohya"), layout_of("flux-kohya").tensors()
    return "flux-kohya", layout.mixin.lora_state_dict(dict(fused)), fused


TWICE = [anime_z, sdxl_of_two_programs, flux_in_two_layouts]


@pytest.mark.parametrize("make", TWICE, ids=lambda make: make.__name__)
def test_layers_that_a_file_holds_by_two_names_are_not_lost(make, tmp_path):
    name, apart, more = make()
    save(path := tmp_path / "x.safetensors", layout_of(name).tensors())
    pipeline = pipeline_for(layout_of(name), path)
    plain = deltas_of(read(pipeline, apart, path), pipeline)
    twice = read(pipeline, {**more, **apart}, path)
    assert twice.left_out is None
    for key, delta in deltas_of(twice, pipeline).items():
        torch.testing.assert_close(delta, plain[key])
    # Half of it: some layers are there by the name only that diffusers does not look at.
    some = sorted(layers_of(key for key in apart if "unet" in key or "transformer" in key))[::2]
    some = some if name != "z-image-twice" else ["diffusion_model.layers.0.attention.to.q"]
    half = {key: one for key, one in apart.items() if layer_of(key) not in some}
    with pytest.raises(errors.InvalidModel, match="only in part"):
        read(pipeline, {**more, **half}, path)
    # And no lie: what it holds by the second name is not the same.
    other = {key: one * 1.5 if "up" in key else one for key, one in more.items()}
    with pytest.raises(errors.InvalidModel, match="only in part"):
        read(pipeline, {**other, **apart}, path)


EMBEDDERS = (
    *("time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer"),
    *("guidance_in_in_layer", "guidance_in_out_layer", "txt_in", "img_in"),
    *("final_layer_linear", "final_layer_adaLN_modulation_1"),
)


def test_embedders_that_diffusers_drops_of_kohya_files_for_flux_are_named(flux):
    pipeline, tensors, path = flux
    more = {
        f"lora_unet_{layer}.{end}": torch.ones(shape_of(end, [8], 12))
        for layer in EMBEDDERS
        for end in KOHYA
    }
    every = len(layers_of(tensors)) + len(EMBEDDERS)
    with pytest.raises(errors.InvalidModel, match=rf"{len(EMBEDDERS)} of its {every} layers"):
        read(pipeline, {**tensors, **more}, path)
    partial = read(pipeline, {**tensors, **more}, path, allow_partial=True)
    assert {layer.removeprefix("lora_unet_") for layer in partial.left_out.layers} == {*EMBEDDERS}


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
    if not reads_lokr(pipeline):
        pytest.skip(f"diffusers {diffusers.__version__} reads none for Flux 2")
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
    with pytest.raises(errors.InvalidModel, match=f"{key}.*must be positive"):
        read(pipeline, {**tensors, key: torch.tensor(alpha)}, path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\n lines of /srv/x"), "two lines of x"),
        (KeyError("up"), "tensors that belong to the others are missing: 'up'"),
        (IndexError("list index out of range"), "its keys match no layout"),
        (AssertionError(), "its keys match no layout"),
        (ValueError("x" * 999), "x" * 600 + "..."),
    ],
)
def test_reasons_are_of_the_file(error, reason):
    assert explain(error, "/srv/x", "x").startswith(reason)
