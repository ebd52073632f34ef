"""What joining does with each value of a call: by its name, its kind and its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bentoml_diffusers._compat import count_writes, tree_flatten
from bentoml_diffusers.engine.forwards.padding import Whole

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from bentoml_diffusers.engine.forwards.padding import PaddedText

# sample: rows of a tensor; items: entries of a list; text and mask: rows that are padded first;
# timestep: becomes a vector; shared and constant: equal in all calls, and passed once.
Role = Literal["sample", "items", "text", "mask", "timestep", "shared", "constant"]

# Tensors without a batch dimension whose first side may equal the number of samples by accident.
_SHARED_ARGUMENTS = frozenset(
    {
        "control_hidden_states_scale",
        "image_rotary_emb",
        "img_ids",
        "padding_mask",
        "rotary_emb",
        "text_rope_pos",
        "txt_ids",
        "visual_rope_pos",
    }
)
# One number for all samples, or one per sample.
_TIMESTEPS = frozenset({"timestep", "timesteps", "t"})
# Lists of plain numbers that say the same for every sample.
_SHARED_LISTS = frozenset({"conditioning_scale"})
# Tensors that may have several rows for each sample, sample by sample: one for each frame of
# AnimateDiff, two images of Wan's first and last frame.
_ROWS_OF_SAMPLES = frozenset(
    {
        "down_block_additional_residuals",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "mid_block_additional_residual",
    }
)
_TEXT_NDIM = 3
_PLAIN = (bool, int, float, str)

_digests = WeakTensorKeyDictionary()


@dataclass(frozen=True, eq=False)
class Items:
    """A list with an entry for each sample; a pytree takes it as one leaf.

    Attributes:
        values: The entries.
        are_samples: They are what the module works on; others may have unlike lengths.
    """

    values: list[Any]
    are_samples: bool = False


class _NotUnderstood:
    """Perhaps an entry for each sample, perhaps not."""


def understand(name: str, value: Any, samples: int, first: Any) -> Any:
    """Returns a list with an entry for each sample as :class:`Items`, anything else as it is.

    A tuple of numbers is one thing, such as a size: a constant. So is a list of another length than
    there are samples. Of a list of that length only equal entries are taken as those of the samples
    (``img_shapes`` of Qwen-Image): then it matters to no sample which one is its own.

    Args:
        name: Of the argument.
        value: Of the argument.
        samples: Of the call.
        first: Value of the first argument: a tensor of samples, or a list of them.
    """
    if not isinstance(value, list) or name in _SHARED_LISTS:
        return value
    if isinstance(first, list) and len(value) == samples and has_tensors(value):
        return Items(value, are_samples=value is first)
    if not any(isinstance(leaf, _PLAIN) for leaf in tree_flatten(value)[0]):
        return value
    if len(value) != samples:
        return value
    is_plain = all(isinstance(leaf, _PLAIN) for leaf in tree_flatten(value)[0])
    is_equal = is_plain and all(item == value[0] for item in value)
    return Items(value) if is_equal else _NotUnderstood()


def classify(
    name: str, leaf: Any, samples: int, texts: Sequence[PaddedText] = ()
) -> tuple[Role, Hashable] | None:
    """Returns what joining does with a value, and what must be equal in all calls.

    Args:
        name: Of the argument that it is in.
        leaf: The value.
        samples: Of the call.
        texts: Arguments that may be padded.
    """
    is_number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    if name in _TIMESTEPS and (is_number or _is_single(leaf)):
        return "timestep", None
    if isinstance(leaf, torch.Tensor):
        return _classify_tensor(name, leaf, samples, texts)
    if isinstance(leaf, Whole):
        return "mask", leaf.device
    if isinstance(leaf, Items):
        return "items", _mark_items(leaf)
    if leaf is None or isinstance(leaf, (*_PLAIN, torch.dtype, torch.device)):
        return "constant", (type(leaf), leaf)
    return None


def _classify_tensor(
    name: str, leaf: torch.Tensor, samples: int, texts: Sequence[PaddedText]
) -> tuple[Role, Hashable]:
    kind = (leaf.dtype, leaf.device)
    is_row = name not in _SHARED_ARGUMENTS and leaf.ndim > 0 and leaf.shape[0] == samples
    if is_row and leaf.ndim >= _TEXT_NDIM and any(name == text.states for text in texts):
        return "text", (leaf.shape[2:], *kind)
    if is_row and any(name == text.mask for text in texts):
        return "mask", leaf.device
    # Timesteps of different dtypes mean the same.
    if is_row and name in _TIMESTEPS and leaf.ndim == 1:
        return "timestep", None
    if is_row:
        return "sample", (leaf.shape[1:], *kind)
    if name in _ROWS_OF_SAMPLES and leaf.ndim >= _TEXT_NDIM and leaf.shape[0] % samples == 0:
        return "sample", (leaf.shape[0] // samples, leaf.shape[1:], *kind)
    return "shared", (leaf.shape, *kind, digest(leaf))


def has_tensors(value: list[Any]) -> bool:
    """True for a list of tensors, each with at least one dimension."""
    return bool(value) and all(isinstance(item, torch.Tensor) and item.ndim for item in value)


def _mark_items(items: Items) -> Hashable:
    if not has_tensors(items.values):
        return repr(items.values[0])
    unlike = 0 if items.are_samples else 1
    return frozenset((item.shape[unlike:], item.dtype, item.device) for item in items.values)


def lengths_of(leaf: Any) -> Hashable:
    """Returns the lengths of text, or of the entries of a list, which may differ by call."""
    if isinstance(leaf, Items):
        return frozenset(item.shape[:1] for item in leaf.values if isinstance(item, torch.Tensor))
    return int(leaf.shape[1])


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.numel() == 1


def digest(tensor: torch.Tensor) -> bytes:
    """Returns a hash of a tensor's bytes, kept as long as it lives and is not written to."""
    version = None if tensor.is_inference() else count_writes(tensor)
    known = _digests.get(tensor)  # type: ignore[no-untyped-call]
    if known is not None and version is not None and known[0] == version:
        return known[1]  # type: ignore[no-any-return]
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    found = hashlib.blake2b(flat.numpy().data, digest_size=16).digest()
    _digests[tensor] = (version, found)
    return found
