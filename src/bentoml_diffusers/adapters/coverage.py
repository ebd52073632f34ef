"""Finds the tensors of a LoRA file that reach no layer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Tensors = dict[str, torch.Tensor]

# What follows the layer's name in the key of a tensor.
_SUFFIX = re.compile(r"(\.|_)(lora[._]|hada_|lokr_|diff|alpha|dora_scale).*|\.(weight|bias|scale)$")


class TracedTensor(torch.Tensor):
    """A tensor that tracks which tensors of a file it was computed from."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        sources = frozenset().union(*(leaf.sources for leaf in given))
        # An operation that returns nothing writes to its first argument.
        for leaf in tree_leaves(args[:1] if result is None else result):
            if isinstance(leaf, cls):
                leaf.sources = sources
        return result


def trace(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns traced copies of tensors; copies, since converters scale some in place."""
    traced: Tensors = {}
    for key, tensor in tensors.items():
        own = tensor.clone().as_subclass(TracedTensor)
        own.sources = frozenset({key})
        traced[key] = own
    return traced


def sources_of(tensors: Iterable[torch.Tensor]) -> set[str]:
    """Returns the names of all tensors that the traced ``tensors`` were computed from."""
    return {name for tensor in tensors for name in getattr(tensor, "sources", ())}


def list_other(file: Mapping[str, torch.Tensor], used: Iterable[torch.Tensor]) -> list[str]:
    """Returns the names of a file's tensors that are not, unchanged, among the ``used``.

    Alphas do not count: they are read as numbers.
    """
    places = {tensor.data_ptr() for tensor in used}
    return [
        key
        for key, tensor in file.items()
        if tensor.data_ptr() not in places and not key.endswith("alpha") and tensor.numel()
    ]


def without_effect(file: Mapping[str, torch.Tensor], layers: Iterable[str]) -> set[str]:
    """Returns those of the ``layers`` that have no effect: a matrix or all differences are zero.

    Trainers write them for layers that they did not train, and diffusers skips them.
    """
    tensors: dict[str, list[torch.Tensor]] = {}
    for key, tensor in file.items():
        if not key.endswith("alpha"):
            tensors.setdefault(layer_of(key), []).append(tensor)
    return {layer for layer in layers if not _adds(tensors[layer])}


def _adds(tensors: Iterable[torch.Tensor]) -> bool:
    matrices = [tensor for tensor in tensors if tensor.ndim > 1]
    others = [tensor for tensor in tensors if tensor.ndim <= 1]
    product = bool(matrices) and all(bool(matrix.any()) for matrix in matrices)
    return product or any(bool(tensor.any()) for tensor in others)


def layer_of(key: str) -> str:
    """Returns the name of a tensor's layer, as the file spells it."""
    return _SUFFIX.sub("", key)


def layers_of(keys: Iterable[str]) -> list[str]:
    """Returns the names of the layers of some keys, as the file spells them."""
    return sorted({layer_of(key) for key in keys})
