"""Random but seeded weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def seeded(build: Callable[P, T]) -> Callable[P, T]:
    """Runs ``build`` with PyTorch's generator at its ``seed``; the generator stays as it was."""

    @functools.wraps(build)
    def seeded_build(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        seed = kwargs.get("seed", args[0] if args else 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))  # type: ignore[call-overload]
            return build(*args, **kwargs)

    return seeded_build
