"""Layers whose stored weights differ from those they compute with: quantized, or cast."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def base_of(layer: Any) -> Any:
    """Returns the layer itself, or the one inside PEFT's wrappers."""
    get_base = getattr(layer, "get_base_layer", None)
    return get_base() if get_base is not None else layer


def is_computed_in(dtype: object) -> bool:
    """True for dtypes that layers compute in; others are only for storage."""
    import torch

    return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """Returns the dtype in which a component computes."""
    import torch

    dtypes = (one.dtype for one in module.parameters())
    return next((one for one in dtypes if is_computed_in(one)), torch.float32)


def name_storage(layer: Any) -> str | None:
    """Returns the storage format of a layer's weight, ``None`` if it computes in that."""
    import torch

    weight = getattr(base_of(layer), "weight", None)
    if weight is None or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return None if weight is None else type(weight).__name__
    return None if is_computed_in(weight.dtype) else str(weight.dtype).removeprefix("torch.")


def count_numbers(layer: Any) -> int:
    """Returns the number of elements in the weight of a layer, however it is packed."""
    import torch

    base = base_of(layer)
    if isinstance(base, torch.nn.Linear):
        return int(base.in_features * base.out_features)
    return math.prod(base.weight.shape)


def is_packed(layer: Any) -> bool:
    """True if the stored weight has another shape than the real one, as with 4 bits."""
    stored: int = math.prod(base_of(layer).weight.shape)
    return stored != count_numbers(layer)
