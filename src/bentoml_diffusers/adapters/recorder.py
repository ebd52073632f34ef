"""Stands in for a component while diffusers loads a LoRA into it, and records the tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import lora_config
from bentoml_diffusers.adapters.patterns import Patterns
from bentoml_diffusers.adapters.raw import LayerLora

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from bentoml_diffusers.adapters.raw import RawLora

Tensors = dict[str, "torch.Tensor"]

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# What slots cannot hold, by a part of its keys.
_BEYOND_SLOTS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_B.bias": "a LoRA with bias",
    ".lokr_": "LoKr",
}
_FUSED = (".to_qkv", ".to_added_qkv")


class Recorder:
    """Stands in for a component; what is loaded into it goes to ``raw``."""

    def __init__(self, name: str, module: Any, raw: RawLora) -> None:
        self._name = name
        self._module = module
        self._raw = raw

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)

    def load_lora_adapter(
        self, state: Tensors, prefix: str | None = "transformer", **given: Any
    ) -> None:
        """Replaces ``PeftAdapterMixin.load_lora_adapter`` of diffusers."""
        from diffusers.utils import convert_unet_state_dict_to_peft

        own = _below(state, prefix)
        if not own or self._is_settled(own):
            return
        if not next(iter(own)).endswith((DOWN, UP)):
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
            config = lora_config(ranks, alphas, own)
        self._record(own, config)

    def load_adapter(self, *, adapter_state_dict: Tensors, peft_config: Any, **_given: Any) -> None:
        """Replaces ``load_adapter`` of a text encoder of transformers."""
        if not self._is_settled(adapter_state_dict):
            self._record(adapter_state_dict, vars(peft_config))

    def to(self, *_args: Any, **_given: Any) -> None:
        """Does nothing: the module stays as it is."""

    def _is_settled(self, state: Tensors) -> bool:
        """True if no part of it can go to slots."""
        keys = "\n".join(state)
        found = next((what for part, what in _BEYOND_SLOTS.items() if part in keys), None)
        if found is None:
            return False
        self._raw.beyond_slots = found
        paths = dict(self._module.named_modules())
        # PEFT skips what it has no layer for.
        lost = next((path for path in map(_layer_of, state) if path not in paths), None)
        if lost is not None and lost.endswith(_FUSED):
            # For such a file diffusers would fuse them in the base model, permanently.
            raise ValueError(
                f"it is for fused projections, which {self._name} does not have: {lost}"
            )
        if lost is not None:
            raise MissingLayer(f"{self._name}.{lost}")
        self._raw.used += state.values()
        return True

    def _record(self, state: Tensors, config: Mapping[str, Any]) -> None:
        layers = self._raw.layers.setdefault(self._name, {})
        alphas, ranks = (Patterns(config.get(f"{kind}_pattern")) for kind in ("alpha", "rank"))
        for layer, down, up in _pairs(state):
            rank = down.shape[0]
            stated = ranks.find(layer, config.get("r", rank))
            if self._raw.has_config and stated != rank:
                raise ValueError(
                    f"its metadata give rank {stated} for {layer}, but it has rank {rank}"
                )
            alpha = float(alphas.find(layer, config.get("lora_alpha", rank)))
            factor = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            layers[layer] = LayerLora(down, up, factor)
        self._raw.used += state.values()


class MissingLayer(Exception):
    """The file has a layer that the component does not have."""


def _layer_of(key: str) -> str:
    return re.split(r"\.(?:lora|lokr|hada)_", key)[0]


def _below(values: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    if prefix is None:
        return dict(values)
    start = f"{prefix}."
    return {key[len(start) :]: value for key, value in values.items() if key.startswith(start)}


def _pairs(state: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for key, tensor in state.items():
        if key.endswith(DOWN):
            layer = key.removesuffix(DOWN)
            if layer + UP not in state:
                raise ValueError(f"{key!r} has no second matrix")
            yield layer, tensor, state[layer + UP]
        elif not key.endswith(UP):
            raise ValueError(f"{key!r} is not understood")
        elif key.removesuffix(UP) + DOWN not in state:
            raise ValueError(f"{key!r} has no first matrix")
