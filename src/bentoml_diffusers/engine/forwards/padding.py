"""Text of unlike length in one forward: padded to the longest, where a module reads a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class PaddedText:
    """Encoded text that a module reads together with a mask.

    Attributes:
        states: Name of the argument with the text, of shape (samples, tokens, width).
        mask: Name of the argument with its mask, of shape (samples, tokens): 0 for padding.
    """

    states: str
    mask: str


@dataclass(frozen=True)
class Whole:
    """The mask of a call that brought none: all of its text counts."""

    shape: tuple[int, ...]
    device: torch.device

    def fill(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns it as a tensor."""
        return torch.ones(self.shape, dtype=dtype, device=self.device)


# By class of the module. Each is proven by the family that has it: padding must change nothing.
_TEXTS: Mapping[str, tuple[PaddedText, ...]] = {
    "Kandinsky3UNet": (PaddedText("encoder_hidden_states", "encoder_attention_mask"),),
    "QwenImageTransformer2DModel": (
        PaddedText("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
}


def texts_of(module: torch.nn.Module) -> tuple[PaddedText, ...]:
    """Returns the arguments of a module that may be padded."""
    return _TEXTS.get(type(module).__name__, ())


def add_masks(arguments: Mapping[str, Any], texts: Sequence[PaddedText]) -> dict[str, Any]:
    """Returns the arguments with a mask for each text, so that all calls have the same ones."""
    added = dict(arguments)
    for text in texts:
        states = arguments.get(text.states)
        if (
            isinstance(states, torch.Tensor)
            and states.ndim > 1
            and arguments.get(text.mask) is None
        ):
            added[text.mask] = Whole(states.shape[:2], states.device)
    return added


def pad_text(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns texts at the length of the longest."""
    longest = max(part.shape[1] for part in parts)
    return [_pad(part, longest) for part in parts]


def pad_masks(parts: Sequence[torch.Tensor | Whole]) -> list[torch.Tensor]:
    """Returns masks at the length of the longest; none if no call brought one or needs it."""
    given = [part for part in parts if isinstance(part, torch.Tensor)]
    if not given and len({part.shape[1] for part in parts}) == 1:
        return []
    dtype = given[0].dtype if given else torch.bool
    return pad_text(
        [part.to(dtype) if isinstance(part, torch.Tensor) else part.fill(dtype) for part in parts]
    )


def _pad(part: torch.Tensor, length: int) -> torch.Tensor:
    if part.shape[1] == length:
        return part
    rest = part.new_zeros((part.shape[0], length - part.shape[1], *part.shape[2:]))
    return torch.cat([part, rest], dim=1)
