"""A LoRA file in diffusers' form, before it is fitted to a base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerLora:
    """The LoRA of one layer.

    Attributes:
        down: First matrix, shape ``(rank, inputs)`` or that of a convolution.
        up: Second matrix, shape ``(outputs, rank)`` or that of a 1 x 1 convolution.
        factor: What its training multiplies it with: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float


@dataclass
class RawLora:
    """A file in diffusers' form.

    Attributes:
        layers: LoRA of each layer, by name of the component and path of the layer in it.
        beyond_slots: What in it only PEFT can apply; ``None``: nothing.
        is_mapped: The tensors are pages of the file, which may change.
        is_finite: All numbers of the file are finite.
    """

    layers: dict[str, dict[str, LayerLora]] = field(default_factory=dict)
    beyond_slots: str | None = None
    is_mapped: bool = False
    is_finite: bool = False
