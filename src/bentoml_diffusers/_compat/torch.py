"""Corners of torch. This module does not load it."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch.utils._pytree import (
        TreeSpec,
        tree_flatten,
        tree_leaves,
        tree_map_only,
        tree_unflatten,
    )

# Until torch (2.13) has them in `torch.utils.pytree`. They are torch's own functions, and called
# for each forward: nothing may stand between.
TREE_FUNCTIONS = ("TreeSpec", "tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten")

# How often a tensor was written to, by C code alone, as each forward asks for it. Until torch
# (2.13) tells it in public.
count_writes = operator.attrgetter("_version")

__all__ = [
    "TreeSpec",
    "compile_in_place",
    "copy_tensors",
    "count_writes",
    "drop_hooks",
    "is_compiled",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "unwrap_compiled",
]


def __getattr__(name: str) -> Any:
    if name not in TREE_FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.utils import _pytree

    return getattr(_pytree, name)


def copy_tensors(places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies many tensors into others at once, which on a GPU is one call for all of them.

    Until torch (2.13) has its ``_foreach`` functions in public.
    """
    import torch

    torch._foreach_copy_(list(places), list(sources))


def unwrap_compiled(module: Any) -> Any:
    """Returns the module in a wrapper of ``torch.compile(module)``, or what is not one itself.

    Until torch (2.13) tells it in public.
    """
    return getattr(module, "_orig_mod", module)


def compile_in_place(pipeline: Any) -> None:
    """Turns what ``torch.compile(module)`` wrapped into modules that are compiled in their place.

    A wrapper is of no class of diffusers, and is in the path of each layer in it, so that neither
    diffusers nor PEFT finds them. Until diffusers (0.42) loads LoRAs into wrapped modules.
    """
    import torch

    for name, part in pipeline.components.items():
        plain = _compile_in_place(part) if isinstance(part, torch.nn.Module) else part
        if plain is not part:
            setattr(pipeline, name, plain)


def _compile_in_place(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module without its wrapper, if it has one."""
    parts = module._modules
    for name, part in parts.items():
        if part is not None:
            parts[name] = _compile_in_place(part)
    wrapped: Any = parts.get("_orig_mod")
    if wrapped is None:
        return module
    # As `Module.compile` does it.
    wrapped._compiled_call_impl = module.dynamo_ctx(wrapped._call_impl)  # type: ignore[operator]
    return wrapped  # type: ignore[no-any-return]


def is_compiled(module: torch.nn.Module) -> bool:
    """True if a module, or a part of it, is compiled in its place.

    Until torch (2.13) tells it in public.
    """
    return any(part._compiled_call_impl is not None for part in module.modules())


def drop_hooks(module: torch.nn.Module) -> None:
    """Takes all hooks off a shallow copy of a module; the module itself keeps its own.

    Until torch (2.13) makes such a copy.
    """
    values = vars(module)
    for name, value in values.items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            values[name] = OrderedDict()
