"""A LoRA file in diffusers' form, before it is matched with a base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    import torch

_SAID = 3  # number of layers that a message names
_ROUNDING = 0.02  # of matrices that were multiplied before they were rounded to 8 bits of mantissa


@dataclass(frozen=True)
class LayerLora:
    """The LoRA of one layer.

    Attributes:
        down: First matrix, shape ``(rank, inputs)`` or that of a convolution.
        up: Second matrix, shape ``(outputs, rank)`` or that of a 1 x 1 convolution.
        factor: Scaling from its training: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float

    def adds_the_same(self, other: LayerLora) -> bool:
        """True if another LoRA changes its layer in the same way, up to rounding.

        Compares what both add to random inputs, which needs no matrix of the weight's size.
        """
        import torch

        sizes = [(lora.down[0].numel(), len(lora.up)) for lora in (self, other)]
        if sizes[0] != sizes[1]:
            return False
        inputs = torch.randn(sizes[0][0], 2, generator=torch.Generator().manual_seed(0))
        mine, theirs = self._apply(inputs), other._apply(inputs)
        return bool((mine - theirs).norm() <= _ROUNDING * mine.norm())

    def _apply(self, inputs: torch.Tensor) -> torch.Tensor:
        down, up = (matrix.float().flatten(1) for matrix in (self.down, self.up))
        return self.factor * (up @ (down @ inputs))


@dataclass(frozen=True)
class LeftOut:
    """Layers of a file that the base model does not have.

    Attributes:
        layers: Their names, as the file spells them.
        every: Number of layers in the file.
    """

    layers: tuple[str, ...]
    every: int

    def refusal(self, name: str, pipeline_class: str) -> InvalidModel:
        """Returns the error that refuses the file."""
        return InvalidModel(
            name,
            f"fits {pipeline_class} only in part: {self}",
            "set the option allow_partial_lora to use the rest of it",
        )

    def __str__(self) -> str:
        some = ", ".join(self.layers[:_SAID])
        more = f" and {len(self.layers) - _SAID} more" if len(self.layers) > _SAID else ""
        of_all = f"{len(self.layers)} of its {self.every} layers"
        return f"{of_all} are not in the base model, such as {some}{more}"


@dataclass
class RawLora:
    """A file in diffusers' form.

    Attributes:
        layers: LoRA of each layer, by component name and path of the layer in it.
        beyond_slots: The part that only PEFT can apply, if any.
        is_finite: All numbers of the file are finite.
        has_config: The file's metadata gives the ranks of its layers.
        used: Tensors that reached a layer.
        absent: Tensors for components of the class that this pipeline lacks.
        left_out: Layers that are not in the base model, if any.
    """

    layers: dict[str, dict[str, LayerLora]] = field(default_factory=dict)
    beyond_slots: str | None = None
    is_finite: bool = False
    has_config: bool = False
    used: list[torch.Tensor] = field(default_factory=list)
    absent: list[torch.Tensor] = field(default_factory=list)
    left_out: LeftOut | None = None
