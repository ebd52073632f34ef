"""Splits what comes out of a shared forward."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence


class NotSplittable(Exception):
    """An output cannot be told apart by samples."""


def split(
    output: Any, counts: Sequence[int], rows: int | None = None, *, in_lists: bool = False
) -> list[Any]:
    """Returns the part of ``output`` that belongs to each call; padding is dropped.

    Args:
        output: Of the shared forward.
        counts: Samples of each call.
        rows: Of the batch with its padding.
        in_lists: The samples are entries of lists.

    Raises:
        NotSplittable: A leaf is neither a tensor of all rows nor a plain constant.
    """
    total = rows or sum(counts)
    is_leaf = (lambda value: _is_list_of_samples(value, total)) if in_lists else _is_list_of_numbers
    leaves, spec = tree_flatten(output, is_leaf=is_leaf)
    parts: list[list[Any]] = [[] for _ in counts]
    for leaf in leaves:
        if in_lists and not _is_list_of_samples(leaf, total):
            raise NotSplittable(f"an output of type {type(leaf).__name__} beside lists of samples")
        for part, piece in zip(parts, _split_leaf(leaf, counts, total), strict=True):
            part.append(piece)
    return [tree_unflatten(part, spec) for part in parts]


def _split_leaf(leaf: Any, counts: Sequence[int], total: int) -> Sequence[Any]:
    if isinstance(leaf, torch.Tensor):
        if leaf.ndim == 0 or leaf.shape[0] != total:
            raise NotSplittable(f"an output of shape {tuple(leaf.shape)} for {total} samples")
        return torch.split(leaf[: sum(counts)], list(counts))
    if isinstance(leaf, list) and len(leaf) == total:
        if not isinstance(leaf[0], (bool, torch.Tensor)):
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
        isinstance(value, list) and bool(value) and all(isinstance(item, numbers) for item in value)
    )


def _is_list_of_samples(value: Any, total: int) -> bool:
    is_list = isinstance(value, list) and len(value) == total
    return is_list and all(isinstance(item, torch.Tensor) for item in value)
