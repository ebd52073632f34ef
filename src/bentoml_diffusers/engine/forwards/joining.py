"""Joins the calls of several requests into one forward.

A call is understood argument by argument, see :mod:`roles`. Whatever is not understood makes the
call run alone: a wrong join would give wrong images without any error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import tree_flatten, tree_unflatten
from bentoml_diffusers.engine.forwards.padding import add_masks, pad_masks, pad_text
from bentoml_diffusers.engine.forwards.roles import (
    Items,
    Role,
    classify,
    has_tensors,
    lengths_of,
    understand,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bentoml_diffusers._compat import TreeSpec
    from bentoml_diffusers.engine.forwards.padding import PaddedText


_LONG = ("text", "items")


@dataclass(frozen=True)
class Call:
    """One call of a module, taken apart.

    Attributes:
        samples: Rows of the batch that this call fills.
        key: Calls of equal key can be joined.
        leaves: All leaves of the arguments' pytree.
        roles: How each leaf is joined.
        spec: The pytree's structure, ``{argument name: value}``.
        structure: The same as text, since a spec has a hash in newer versions of torch only; with
            the roles.
        device: Where the samples are.
        lengths: Of its text, which may be padded to that of another call.
        in_lists: Samples are entries of lists, not rows of tensors.
    """

    samples: int
    key: Hashable
    leaves: tuple[Any, ...]
    roles: tuple[Role, ...]
    spec: TreeSpec
    structure: str
    device: torch.device
    lengths: tuple[Hashable, ...] = ()
    in_lists: bool = False


def take_apart(arguments: Mapping[str, Any], texts: Sequence[PaddedText] = ()) -> Call | None:
    """Returns the call, or ``None`` if it must run alone.

    Args:
        arguments: Arguments by name, those with their default value left out. The first one is a
            tensor whose first dimension counts the samples, or a list of a tensor for each.
        texts: Arguments that may be padded.
    """
    first: Any = next(iter(arguments.values()), None)
    in_lists = isinstance(first, list) and has_tensors(first)
    if not in_lists and (not isinstance(first, torch.Tensor) or first.ndim < 2):
        return None
    samples = len(first)
    arguments = add_masks(arguments, texts)
    understood = {
        name: understand(name, value, samples, first) for name, value in arguments.items()
    }
    found = [
        classify(name, leaf, samples, texts)
        for name, value in understood.items()
        for leaf in tree_flatten(value)[0]
    ]
    if None in found:
        return None
    roles, marks = zip(*found, strict=True)
    leaves, spec = tree_flatten(understood)
    structure = repr((spec, roles))
    key = (structure, marks, _thread_modes())
    lengths = tuple(
        lengths_of(leaf) for leaf, role in zip(leaves, roles, strict=True) if role in _LONG
    )
    return Call(
        *(samples, key, tuple(leaves), roles, spec, structure, first[0].device, lengths, in_lists)
    )


def join(calls: Sequence[Call], rows: int | None = None) -> dict[str, Any]:
    """Returns the arguments of one call that covers all calls.

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
            parts = _expand_timesteps(parts, counts, calls[0].device)
        if role == "text":
            parts = pad_text(parts)
        if role == "mask":
            parts = pad_masks(parts)
        if role in ("constant", "shared") or not parts:
            joined.append(parts[0] if parts else None)
        elif role == "items":
            items = [item for part in parts for item in part.values]
            joined.append(items + items[-1:] * padding)
        else:
            joined.append(torch.cat(_repeat_last(parts, padding, counts[-1])))
    return tree_unflatten(joined, calls[0].spec)  # type: ignore[no-any-return]


def perturb(call: Call, share: float) -> Call:
    """Returns the call with each number of its samples changed by a share, up and down in turn."""
    leaves = [
        _perturb(leaf, share) if role in ("sample", "items", "text") else leaf
        for leaf, role in zip(call.leaves, call.roles, strict=True)
    ]
    return replace(call, leaves=tuple(leaves))


def _expand_timesteps(
    parts: Sequence[Any], counts: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """One timestep per row. Integers of some schedulers become floats beside floats."""
    tensors = [torch.as_tensor(part) for part in parts]
    mixed = len({tensor.dtype for tensor in tensors}) > 1
    return [
        tensor.to(device=device, dtype=torch.float32 if mixed else None).reshape(-1).expand(count)
        for tensor, count in zip(tensors, counts, strict=True)
    ]


def _repeat_last(parts: list[Any], padding: int, samples: int) -> list[Any]:
    """Repeats the rows of the last sample; some tensors have several rows for each."""
    if not padding:
        return parts
    rows = parts[-1].shape[0] // samples
    return [*parts, *[parts[-1][-rows:]] * padding]


def _perturb(leaf: Any, share: float) -> Any:
    if isinstance(leaf, Items):
        return replace(leaf, values=[_perturb(item, share) for item in leaf.values])
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    odd = torch.arange(leaf.numel(), device=leaf.device).remainder(2).reshape(leaf.shape)
    changed: torch.Tensor = leaf * (1 + share * (1 - 2 * odd)).to(leaf.dtype)
    return changed


def _thread_modes() -> tuple[bool, ...]:
    """Modes of the calling thread that change the result of a forward."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
