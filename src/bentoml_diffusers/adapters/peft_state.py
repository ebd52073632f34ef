"""Saves and restores what a call can change in PEFT's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import tuner_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch


@dataclass(frozen=True)
class LayerState:
    """The state of a layer with adapters.

    Attributes:
        layer: PEFT's wrapper.
        scaling: alpha / rank times the scale, by name of the adapter. diffusers multiplies and
            divides it in place for a call with a scale; after a scale of 0 it sets 1.
        active: Names of the adapters that are added.
        is_disabled: All adapters are disabled.
    """

    layer: Any
    scaling: Mapping[str, float]
    active: tuple[str, ...]
    is_disabled: bool

    def restore_scaling(self) -> None:
        """Restores the scales; those of other adapters stay."""
        self.layer.scaling.update(self.scaling)

    def restore(self) -> None:
        """Restores everything; other adapters are turned off."""
        self.restore_scaling()
        if tuple(self.layer.active_adapters) != self.active:
            self.layer.set_adapter(list(self.active))
        if self.layer.disable_adapters != self.is_disabled:
            self.layer.enable_adapters(not self.is_disabled)


def peft_layers(modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """Yields PEFT's wrappers in ``modules``."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, tuner_layer()):
                yield part


def note_state(modules: Iterable[torch.nn.Module]) -> list[LayerState]:
    """Returns the state of each layer in ``modules`` that has adapters."""
    return [
        LayerState(layer, dict(layer.scaling), tuple(layer.active_adapters), layer.disable_adapters)
        for layer in peft_layers(modules)
    ]
