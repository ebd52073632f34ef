"""Checks that the rows of a shared forward equal those of lone ones, up to rounding.

Code that reads a row's meaning from its place in the batch gives wrong images without an error
when calls are joined. So the first shared forward of each kind is compared with the lone ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Another batch size rounds differently, by about 1e-6 of a row in float32, and by a few rounding
# steps in half formats. A difference below this share of a row is not a sample in a wrong place.
_CERTAIN = 1e-4
_STEPS = 4
# A larger one is compared with the effect of changing the inputs by one rounding step, which
# deep or random weights amplify. The factor: a batch rounds at each layer, not once.
_AMPLIFIED = 10.0
# By PyTorch's default, float32 convolutions on CUDA round their inputs to TF32.
_TF32_STEP = 2.0**-11


@dataclass(frozen=True)
class Verdict:
    """The distance of a shared forward from lone ones.

    Attributes:
        gap: Largest distance of a row, as a share of the row.
        rounding: The share that rounding explains.
    """

    gap: float
    rounding: float

    @property
    def is_same(self) -> bool:
        """True if rounding explains the distance."""
        return self.gap <= self.rounding


def compare_outputs(
    shared: Sequence[Any], lone: Sequence[Any], perturb: Callable[[int, float], Any]
) -> Verdict:
    """Compares each call's output from a shared forward with that of its own forward.

    Args:
        shared: Output for each call, from the shared forward.
        lone: Output of each call's own forward.
        perturb: Returns the output of the forward of one call, by its index, with inputs changed by
            a share.
    """
    gaps = [measure_gap(*pair) for pair in zip(shared, lone, strict=True)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    step = _rounding_step(lone[worst])
    certain = max(_CERTAIN, _STEPS * step)
    if gaps[worst] <= certain:
        return Verdict(gaps[worst], certain)
    noise = measure_gap(perturb(worst, step), lone[worst])
    return Verdict(gaps[worst], max(certain, _AMPLIFIED * noise))


def measure_gap(output: Any, expected: Any) -> float:
    """Returns the largest distance of a row from the expected one, as a share of it."""
    pairs = zip(tree_leaves(output), tree_leaves(expected), strict=True)
    return max((_gap_of_rows(*pair) for pair in pairs if _is_floating(pair[1])), default=0.0)


def _gap_of_rows(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    rows = len(expected)
    here, there = (
        torch.nan_to_num(part.detach().float()).reshape(rows, -1) for part in (tensor, expected)
    )
    distance = (here - there).norm(dim=1)
    share = distance / there.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(share.max())


def _rounding_step(output: Any) -> float:
    floats = [leaf for leaf in tree_leaves(output) if _is_floating(leaf)]
    steps = [torch.finfo(leaf.dtype).eps for leaf in floats]
    on_cuda = any(leaf.device.type == "cuda" for leaf in floats)
    return max([*steps, _TF32_STEP if on_cuda else 0.0])


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0
