"""Joins the calls of several requests into one forward, and splits what comes out of it.

A call is understood argument by argument. Whatever is not understood makes the call run alone:
a wrong join would give wrong images without any error.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bentoml_diffusers._compat import count_writes, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bentoml_diffusers._compat import TreeSpec

Role = Literal["sample", "timestep", "shared", "constant"]

# Tensors without a batch dimension whose first side may equal the number of samples by accident.
_SHARED_ARGUMENTS = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "control_hidden_states_scale"}
)
# One number for all samples, or one per sample.
_TIMESTEPS = frozenset({"timestep", "timesteps", "t"})
# Lists of plain numbers that say the same for every sample.
_SHARED_LISTS = frozenset({"conditioning_scale"})

_digests = WeakTensorKeyDictionary()


class NotSplittable(Exception):
    """An output cannot be told apart by samples."""


@dataclass(frozen=True)
class Call:
    """One call of a module, taken apart.

    Attributes:
        samples: Rows of the batch that this call fills.
        key: Calls of equal key can be joined.
        leaves: All leaves of the arguments' pytree.
        roles: What joining does with each leaf.
        spec: The pytree's structure, ``{argument name: value}``.
        structure: The same as text, since a spec has a hash in newer versions of torch only.
    """

    samples: int
    key: Hashable
    leaves: tuple[Any, ...]
    roles: tuple[Role, ...]
    spec: TreeSpec
    structure: str


def take_apart(arguments: Mapping[str, Any]) -> Call | None:
    """Returns the call, or ``None`` if it must run alone.

    Args:
        arguments: Arguments by name, those with their default value left out. The first one is a
            tensor whose first dimension counts the samples.
    """
    first = next(iter(arguments.values()), None)
    if not isinstance(first, torch.Tensor) or first.ndim < 2:
        return None
    samples = first.shape[0]
    leaves: list[Any] = []
    roles: list[Role] = []
    marks: list[Hashable] = []
    for name, value in arguments.items():
        for leaf in _leaves(name, value):
            found = _classify(name, leaf, samples)
            if found is None:
                return None
            leaves.append(leaf)
            roles.append(found[0])
            marks.append(found[1])
    _, spec = tree_flatten(dict(arguments))
    structure = repr(spec)
    key = (structure, tuple(marks), _thread_modes())
    return Call(samples, key, tuple(leaves), tuple(roles), spec, structure)


def join(calls: Sequence[Call], rows: int | None = None) -> dict[str, Any]:
    """Returns the arguments of one call that does the work of all.

    Args:
        calls: Calls of equal key.
        rows: Size to pad the batch to, by repeating the last row; ``None`` does not pad.
    """
    counts = [call.samples for call in calls]
    padding = 0 if rows is None else rows - sum(counts)
    joined = []
    for index, role in enumerate(calls[0].roles):
        parts = [call.leaves[index] for call in calls]
        if role == "timestep":
            parts = _expand_timesteps(parts, counts, calls[0].leaves[0].device)
        if role in ("sample", "timestep"):
            if padding:
                parts.append(parts[-1][-1:].expand(padding, *parts[-1].shape[1:]))
            joined.append(torch.cat(parts))
        else:
            joined.append(parts[0])
    return tree_unflatten(joined, calls[0].spec)  # type: ignore[no-any-return]


def perturb(call: Call, share: float) -> Call:
    """Returns the call with each number of its samples changed by a share, up and down in turn."""
    leaves = [
        _perturb_leaf(leaf, share) if role == "sample" else leaf
        for leaf, role in zip(call.leaves, call.roles, strict=True)
    ]
    return replace(call, leaves=tuple(leaves))


def split(output: Any, counts: Sequence[int], rows: int | None = None) -> list[Any]:
    """Returns the part of ``output`` that belongs to each call; padding is dropped.

    Raises:
        NotSplittable: A leaf is neither a tensor of all rows nor a plain constant.
    """
    leaves, spec = tree_flatten(output, is_leaf=_is_list_of_numbers)
    total = rows or sum(counts)
    parts: list[list[Any]] = [[] for _ in counts]
    for leaf in leaves:
        for part, piece in zip(parts, _split_leaf(leaf, counts, total), strict=True):
            part.append(piece)
    return [tree_unflatten(part, spec) for part in parts]


def _leaves(name: str, value: Any) -> list[Any]:
    leaves: list[Any] = tree_flatten(value)[0]
    is_list = isinstance(value, (list, tuple)) and name not in _SHARED_LISTS
    if is_list and any(isinstance(leaf, (int, float, str)) for leaf in leaves):
        return [_NOT_UNDERSTOOD]  # perhaps one number per sample
    return leaves


_NOT_UNDERSTOOD = object()


def _classify(name: str, leaf: Any, samples: int) -> tuple[Role, Hashable] | None:
    is_number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    if name in _TIMESTEPS and (is_number or _is_single(leaf)):
        return "timestep", None
    if isinstance(leaf, torch.Tensor):
        if name not in _SHARED_ARGUMENTS and leaf.ndim and leaf.shape[0] == samples:
            # Timesteps of different dtypes mean the same, see `_expand_timesteps`.
            if name in _TIMESTEPS and leaf.ndim == 1:
                return "timestep", None
            return "sample", (leaf.shape[1:], leaf.dtype, leaf.device)
        return "shared", (leaf.shape, leaf.dtype, leaf.device, _digest(leaf))
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return "constant", (type(leaf), leaf)
    return None


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.numel() == 1


def _expand_timesteps(
    parts: Sequence[Any], counts: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """One timestep per row. Whole numbers of some schedulers become floats beside floats."""
    tensors = [torch.as_tensor(part) for part in parts]
    mixed = len({tensor.dtype for tensor in tensors}) > 1
    return [
        tensor.to(device=device, dtype=torch.float32 if mixed else None).reshape(-1).expand(count)
        for tensor, count in zip(tensors, counts, strict=True)
    ]


def _perturb_leaf(leaf: torch.Tensor, share: float) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    odd = torch.arange(leaf.numel(), device=leaf.device).remainder(2).reshape(leaf.shape)
    changed: torch.Tensor = leaf * (1 + share * (1 - 2 * odd)).to(leaf.dtype)
    return changed


def _split_leaf(leaf: Any, counts: Sequence[int], total: int) -> Sequence[Any]:
    if isinstance(leaf, torch.Tensor):
        if leaf.ndim == 0 or leaf.shape[0] != total:
            raise NotSplittable(f"an output of shape {tuple(leaf.shape)} for {total} samples")
        return torch.split(leaf[: sum(counts)], list(counts))
    if isinstance(leaf, list) and len(leaf) == total:
        if not isinstance(leaf[0], bool):
            raise NotSplittable(f"{total} numbers for {total} samples, perhaps one for each")
        ends = itertools.accumulate(counts)
        return [leaf[end - count : end] for end, count in zip(ends, counts, strict=True)]
    if leaf is None or isinstance(leaf, (bool, int, float, str, list)):
        return [leaf] * len(counts)
    raise NotSplittable(f"an output of type {type(leaf).__name__}")


def _is_list_of_numbers(value: Any) -> bool:
    """True for what may have an entry for each row, as the flags of a safety checker."""
    numbers = (bool, int, float)
    return (
        isinstance(value, list) and bool(value) and all(isinstance(one, numbers) for one in value)
    )


def _digest(tensor: torch.Tensor) -> bytes:
    """Hash of a tensor's bytes, kept as long as the tensor lives and is not written to."""
    version = None if tensor.is_inference() else count_writes(tensor)
    known = _digests.get(tensor)  # type: ignore[no-untyped-call]
    if known is not None and version is not None and known[0] == version:
        return known[1]  # type: ignore[no-any-return]
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    digest = hashlib.blake2b(flat.numpy().data, digest_size=16).digest()
    _digests[tensor] = (version, digest)
    return digest


def _thread_modes() -> tuple[bool, ...]:
    """Modes of the calling thread under which a forward means something else."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
