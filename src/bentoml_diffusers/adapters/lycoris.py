"""Applies LoHa and LoKr files of LyCORIS through PEFT; diffusers reads them for few models only."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _compat
from bentoml_diffusers.adapters.denoisers import standing_for
from bentoml_diffusers.adapters.storage import (
    compute_dtype,
    count_numbers,
    is_computed_in,
    is_packed,
    name_storage,
)
from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from diffusers import DiffusionPipeline

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>hada_\w+|lokr_\w+|alpha)")
_KINDS = {"hada_": "LoHa", "lokr_": "LoKr"}
# Trainers' prefixes for components; the dots in the layer's name become underscores.
_PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lora_te_text_model_", "lora_te1_text_model_"),
    "text_encoder_2": ("lora_te2_", "lora_te2_text_model_"),
}


@dataclass(frozen=True)
class LycorisLayer:
    """The tensors of one layer.

    Attributes:
        component: Name of the component.
        path: Path of the layer in it.
        parts: Its matrices by the names that LyCORIS and PEFT share.
        alpha: Its alpha, if the file gives one.
    """

    component: str
    path: str
    parts: Mapping[str, torch.Tensor]
    alpha: float | None

    @property
    def kind(self) -> str:
        """Returns ``"LoHa"`` or ``"LoKr"``."""
        return _KINDS[next(iter(self.parts))[:5]]

    @property
    def rank(self) -> int | None:
        """Returns its rank; ``None`` if no matrix is factored, which alpha does not scale."""
        for name, axis in (("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.parts:
                return int(self.parts[name].shape[axis])
        return None


def kind_of(keys: Iterable[str]) -> str | None:
    """Returns ``"LoHa"``, ``"LoKr"`` or both if the names of a file's tensors say so."""
    matches = [match for match in map(_KEY.fullmatch, keys) if match and match["part"] != "alpha"]
    kinds = sorted({_KINDS[match["part"][:5]] for match in matches})
    return " and ".join(kinds) or None


def is_lycoris_of(
    pipeline: DiffusionPipeline,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    components: Sequence[str] = (),
) -> bool:
    """True if a file should be read here; false if diffusers' own reader should decide.

    That one reads the LoKr layouts of a few models.

    Raises:
        InvalidModel: 400, a layer is missing or has another shape.
    """
    try:
        for component in components or ("",):
            read_lycoris(standing_for(pipeline, component), name, tensors)
    except InvalidModel:
        if _compat.reads_lokr(pipeline) and kind_of(tensors) == "LoKr":
            return False
        raise
    return True


def read_lycoris(
    pipeline: DiffusionPipeline, name: str, tensors: Mapping[str, torch.Tensor]
) -> list[LycorisLayer]:
    """Assigns the tensors of a file to the layers of a pipeline; changes nothing.

    Raises:
        InvalidModel: 400, a layer is missing or has another shape.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InvalidModel(name, f"holds {key!r}, which is not part of a {kind_of(tensors)}")
        found.setdefault(match["layer"], {})[match["part"]] = tensor
    names = _names_of_layers(pipeline)
    return [_checked(pipeline, name, names, layer, parts) for layer, parts in found.items()]


def inject(
    pipeline: DiffusionPipeline, layers: Iterable[LycorisLayer], adapter_name: str
) -> list[str]:
    """Wraps the layers with PEFT; existing adapters stay underneath.

    Returns:
        The names of its adapters: PEFT's adapters have one kind each, a file may hold two.
    """
    parts: dict[tuple[str, str], list[LycorisLayer]] = {}
    for layer in layers:
        parts.setdefault((layer.component, layer.kind), []).append(layer)
    for (component, kind), mine in parts.items():
        module, name = getattr(pipeline, component), f"{adapter_name}_{kind}"
        module.add_adapter(_config(mine), adapter_name=name)
        dtype = compute_dtype(module)
        for layer in mine:
            _fill(module.get_submodule(layer.path), layer, name, dtype)
    return sorted({f"{adapter_name}_{kind}" for _, kind in parts})


def _names_of_layers(pipeline: DiffusionPipeline) -> dict[str, tuple[str, str]]:
    names = {}
    for component, prefixes in _PREFIXES.items():
        module = getattr(pipeline, component, None)
        blocks = getattr(getattr(module, "config", None), "layers_per_block", None)
        for path, _ in module.named_modules() if module is not None else ():
            names[f"{component}.{path}"] = (component, path)
            spellings = {path, original_name(path, blocks)} if component == "unet" else {path}
            for prefix, spelling in itertools.product(prefixes, spellings):
                names[prefix + spelling.replace(".", "_")] = (component, path)
    return names


# Layers of a UNet outside its blocks, and within a residual block, as Stability's code names them.
_ORIGINAL_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_ORIGINAL_PARTS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)(?:\.(?P<rest>.+))?"
)


def original_name(path: str, layers_per_block: int | None) -> str:
    """Returns the name of a UNet layer in Stability's own code, which kohya uses for SDXL.

    There the blocks of all resolutions are numbered consecutively: ``input_blocks.N``,
    ``middle_block.N``, ``output_blocks.N``, each with a residual block, an attention, a resampling.

    Args:
        path: Its path in diffusers, such as ``"down_blocks.1.attentions.0.proj_in"``.
        layers_per_block: From the UNet's config; without it the name is returned unchanged.
    """
    found = _BLOCK.fullmatch(path)
    if found is None or not isinstance(layers_per_block, int):
        return _ORIGINAL_LAYERS.get(path, path)
    kind, index, rest = found["kind"], int(found["index"]), found["rest"]
    block, length = int(found["block"] or 0), layers_per_block + 1
    inner = {"resnets": 0, "attentions": 1}.get(kind, 0)
    if found["side"] == "down":
        number = length * (block + 1) if kind == "downsamplers" else length * block + index + 1
        start = f"input_blocks.{number}.{inner}"
    elif found["side"] == "up":
        number = length * block + (layers_per_block if kind == "upsamplers" else index)
        # After the attention, which SDXL has wherever the size changes.
        start = f"output_blocks.{number}.{2 if kind == 'upsamplers' else inner}"
    else:
        start = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    rest = {"downsamplers": "op"}.get(kind) or _ORIGINAL_PARTS.get(rest or "", rest)
    return f"{start}.{rest}" if rest else start


def _checked(
    pipeline: DiffusionPipeline,
    name: str,
    names: Mapping[str, tuple[str, str]],
    layer: str,
    parts: dict[str, torch.Tensor],
) -> LycorisLayer:
    if layer not in names:
        raise InvalidModel(name, f"was made for another base model: there is no layer {layer}")
    component, path = names[layer]
    alpha = parts.pop("alpha", None)
    if len({part[:5] for part in parts}) != 1:
        raise InvalidModel(
            name, f"is broken: {layer} mixes the tensors of several kinds: {', '.join(parts)}"
        )
    target = getattr(pipeline, component).get_submodule(path)
    try:
        numbers = _count(parts)
    except (KeyError, RuntimeError, IndexError) as err:
        raise InvalidModel(name, f"is incomplete at {layer}: {err}") from err
    if numbers != count_numbers(target):
        raise InvalidModel(
            name, f"was made for another base model: {layer} has another shape there"
        )
    if is_packed(target):
        raise InvalidModel(
            name,
            f"is a {_KINDS[next(iter(parts))[:5]]}, which PEFT cannot apply to quantized weights: "
            f"{component}.{path} stores them as {name_storage(target)}",
            "use a LoRA, or load the model without quantization_config",
        )
    return LycorisLayer(component, path, parts, None if alpha is None else float(alpha))


def _count(parts: Mapping[str, torch.Tensor]) -> int:
    """Number of elements in the weight that the parts produce."""
    shapes = {key: part.to("meta") for key, part in parts.items()}
    if "hada_w1_a" in shapes:
        if "hada_t1" in shapes:
            kernel = shapes["hada_t1"][0, 0].numel()
            return shapes["hada_w1_a"].shape[1] * shapes["hada_w1_b"].shape[1] * kernel
        one = shapes["hada_w1_a"] @ shapes["hada_w1_b"]
        return (one * (shapes["hada_w2_a"] @ shapes["hada_w2_b"])).numel()
    factors = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in shapes:
            factors.append(shapes[side].numel())
        elif side == "lokr_w2" and "lokr_t2" in shapes:
            kernel = shapes["lokr_t2"][0, 0].numel()
            outer = shapes[f"{side}_a"].shape[1] * shapes[f"{side}_b"].shape[1]
            factors.append(outer * kernel)
        else:
            factors.append((shapes[f"{side}_a"] @ shapes[f"{side}_b"].flatten(1)).numel())
    return factors[0] * factors[1]


def _config(layers: list[LycorisLayer]) -> Any:
    from peft import LoHaConfig, LoKrConfig

    kinds = {"LoHa": LoHaConfig, "LoKr": LoKrConfig}
    # The rank comes from the file, and is set afterwards.
    return kinds[layers[0].kind](r=1, alpha=1, target_modules=[layer.path for layer in layers])


def _fill(wrapper: Any, layer: LycorisLayer, adapter_name: str, dtype: torch.dtype) -> None:
    """Copies the matrices in, as ``dtype`` where the weight's own is only for storage."""
    import torch

    weight = wrapper.get_base_layer().weight
    dtype = weight.dtype if is_computed_in(weight.dtype) else dtype
    for part in wrapper.adapter_layer_names:
        held = getattr(wrapper, part)
        if adapter_name in held:
            del held[adapter_name]
        if part in layer.parts:
            tensor = layer.parts[part].to(weight.device, dtype)
            held[adapter_name] = torch.nn.Parameter(tensor, requires_grad=False)
    rank = layer.rank or 1
    alpha = layer.alpha if layer.alpha is not None and layer.rank else rank
    wrapper.r[adapter_name], wrapper.alpha[adapter_name] = rank, alpha
    wrapper.scaling[adapter_name] = alpha / rank
