"""From a LoRA file to the weights of each layer, by diffusers' own converters; changes nothing.

diffusers converts a file while it loads it into the pipeline's modules. Here its
``load_lora_weights`` runs on a stand-in whose components only write down what they are given, so
every layout that diffusers knows (kohya, XLabs, BFL ...) arrives in one form, within milliseconds.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.adapters.denoisers import loader_arguments, standing_for
from bentoml_diffusers.adapters.files import read_tensors
from bentoml_diffusers.adapters.lycoris import kind_of, read_lycoris
from bentoml_diffusers.adapters.raw import LayerLora, RawLora
from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.layers import LayerMap

Tensors = dict[str, "torch.Tensor"]

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PLAIN = re.compile(r"[\w.]+")
# What a slot cannot hold, by what its keys contain.
_BEYOND_SLOTS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_B.bias": "a LoRA with bias",
}


def convert_lora(
    pipeline: DiffusionPipeline,
    layers: LayerMap,
    name: str,
    path: Path,
    components: Sequence[str] = (),
) -> RawLora:
    """Reads a LoRA as ``type(pipeline)`` reads it.

    Args:
        pipeline: A pipeline that takes LoRAs; only looked at.
        layers: Its layers.
        name: Name of the LoRA, for messages.
        path: A safetensors file.
        components: Denoisers that it is for; none: the one that diffusers takes.

    Raises:
        InvalidModel: 400, no LoRA for this pipeline.
    """
    file = read_tensors(name, path)
    _check_keys(name, list(file.tensors))
    # diffusers looks at what a file says about itself only if it reads the file itself, which
    # takes longer.
    raw = RawLora(is_mapped=bool(file.about), is_finite=file.is_finite)
    raw.beyond_slots = kind_of(file.tensors)
    if raw.beyond_slots is not None:
        for component in components or ("",):
            read_lycoris(standing_for(pipeline, component), name, file.tensors)
        return raw
    source = str(path) if file.about else file.tensors
    stand_in = _stand_in(pipeline, layers, name, raw)
    try:
        for component in components or ("",):
            stand_in.load_lora_weights(
                source,
                adapter_name="request",
                use_safetensors=True,
                **loader_arguments(component),
            )
    except InvalidModel:
        raise
    except Exception as err:
        reason = str(err).strip().split("\n", 1)[0][:300].replace(str(path), name)
        raise InvalidModel(
            name, f"is no LoRA for {type(pipeline).__name__}: {reason or type(err).__name__}"
        ) from err
    if not raw.layers and raw.beyond_slots is None:
        raise InvalidModel(name, f"has no layer in common with {type(pipeline).__name__}")
    return raw


def _check_keys(name: str, keys: Sequence[str]) -> None:
    """Refuses what diffusers would drop, or answer with a puzzling error."""
    if not keys:
        raise InvalidModel(name, "is empty")
    if any("dora_scale" in key for key in keys):
        raise InvalidModel(
            name,
            "is a DoRA in the layout of kohya, whose magnitudes diffusers drops",
            "save it in the layout of diffusers",
        )


def _stand_in(pipeline: DiffusionPipeline, layers: LayerMap, name: str, raw: RawLora) -> Any:
    """Returns an object with the loaders of the pipeline's class and recorders for components."""
    cls: type[DiffusionPipeline] = type(pipeline)
    stand_in: Any = object.__new__(cls)
    # Tells diffusers that there is no offloading whose hooks it would have to remove.
    converter = _checked_converter(pipeline, layers, name)
    values: dict[str, Any] = {"hf_device_map": {}, "lora_state_dict": converter}
    for component, module in pipeline.components.items():
        is_module = hasattr(module, "named_modules")
        values[component] = _Recorder(component, module, raw) if is_module else module
    stand_in.__dict__.update(values)
    return stand_in


def _checked_converter(
    pipeline: DiffusionPipeline, layers: LayerMap, name: str
) -> Callable[..., Any]:
    """Wraps ``lora_state_dict``: what would write to the base model is refused before it can."""

    def lora_state_dict(*args: Any, **kwargs: Any) -> Any:
        answer = pipeline.lora_state_dict(*args, **kwargs)
        state = answer[0] if isinstance(answer, tuple) else answer
        for key in state:
            if "lora" not in key and "lokr" not in key and "alpha" not in key:
                raise InvalidModel(
                    name, f"holds {key!r}, which is no LoRA", "a request cannot replace weights"
                )
        _check_widths(layers, name, state)
        return answer

    return lora_state_dict


def _check_widths(layers: LayerMap, name: str, state: Tensors) -> None:
    """Refuses a LoRA that takes other inputs than its layer has.

    diffusers widens the layers of some transformers for such a one (control LoRAs of Flux).
    """
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        layer = rest.removesuffix(_DOWN)
        if layer == rest:
            continue
        inputs = getattr(layers.module(component, layer), "in_features", None)
        given = math.prod(tensor.shape[1:])
        if inputs not in (None, given):
            raise InvalidModel(
                name,
                f"was made for another base model: {component}.{layer} takes {inputs} inputs, "
                f"the LoRA {given}",
            )


class _Recorder:
    """Stands for a component; what is loaded into it goes to ``raw``."""

    def __init__(self, name: str, module: Any, raw: RawLora) -> None:
        self._name = name
        self._module = module
        self._raw = raw

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)

    def load_lora_adapter(
        self, state: Tensors, prefix: str | None = "transformer", **given: Any
    ) -> None:
        """Stands for ``PeftAdapterMixin.load_lora_adapter`` of diffusers."""
        from diffusers.utils import convert_unet_state_dict_to_peft
        from diffusers.utils.peft_utils import get_peft_kwargs

        own = _below(state, prefix)
        if not own or self._is_beyond_slots(own):
            return
        if not next(iter(own)).endswith((_DOWN, _UP)):
            own = convert_unet_state_dict_to_peft(own)
        config = given.get("metadata")
        if config is not None:
            config = _below(config, prefix)
        else:
            alphas = {
                key.removeprefix(f"{prefix}."): value
                for key, value in (given.get("network_alphas") or {}).items()
                if key.startswith(f"{prefix}.")
            }
            ranks = {f"^{key}": value.shape[1] for key, value in own.items() if "lora_B" in key}
            config = get_peft_kwargs(ranks, alphas, own)
        self._record(own, config)

    def load_adapter(self, *, adapter_state_dict: Tensors, peft_config: Any, **_given: Any) -> None:
        """Stands for ``load_adapter`` of a text encoder of transformers."""
        if not self._is_beyond_slots(adapter_state_dict):
            self._record(adapter_state_dict, vars(peft_config))

    def to(self, *_args: Any, **_given: Any) -> None:
        """Does nothing: the module stays as it is."""

    def _is_beyond_slots(self, state: Tensors) -> bool:
        keys = "\n".join(state)
        found = next((what for part, what in _BEYOND_SLOTS.items() if part in keys), None)
        self._raw.beyond_slots = found or self._raw.beyond_slots
        return found is not None

    def _record(self, state: Tensors, config: Mapping[str, Any]) -> None:
        layers = self._raw.layers.setdefault(self._name, {})
        for layer, down, up in _pairs(state):
            layers[layer] = LayerLora(down, up, _factor(layer, down.shape[0], config))


def _below(values: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    if prefix is None:
        return dict(values)
    start = f"{prefix}."
    return {key[len(start) :]: value for key, value in values.items() if key.startswith(start)}


def _pairs(state: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for key, tensor in state.items():
        if key.endswith(_DOWN):
            layer = key.removesuffix(_DOWN)
            if layer + _UP not in state:
                raise ValueError(f"{key!r} has no second matrix")
            yield layer, tensor, state[layer + _UP]
        elif not key.endswith(_UP):
            raise ValueError(f"{key!r} is not understood")
        elif key.removesuffix(_UP) + _DOWN not in state:
            raise ValueError(f"{key!r} has no first matrix")


def _factor(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """As PEFT scales a layer: alpha / rank, where patterns name the alphas of single layers."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(layer, patterns.get(f"^{layer}"))
    if alpha is None:
        default = config.get("lora_alpha", rank)
        alpha = next((patterns[key] for key in patterns if _matches(key, layer)), default)
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _matches(pattern: str, layer: str) -> bool:
    if _PLAIN.fullmatch(pattern):
        return layer.endswith(f".{pattern}")
    return pattern[0] != "^" and re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
