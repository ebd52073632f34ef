"""Finds the schedulers that a pipeline's code can use."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from bentoml_diffusers import _names

if TYPE_CHECKING:
    from collections.abc import Hashable

    from diffusers import SchedulerMixin


def fitting_schedulers(
    base: SchedulerMixin, pipeline_class: type[Any] | None = None
) -> dict[str, type[SchedulerMixin]]:
    """Returns the scheduler classes, by name, that a request can choose.

    Args:
        base: The model's scheduler.
        pipeline_class: Class of the pipeline that calls them; ``None``: any.
    """
    suits = functools.partial(_suits, _read_call(cast("Hashable", pipeline_class)))
    fitting = _names.fitting_schedulers(base)
    return {**dict(filter(suits, fitting.items())), type(base).__name__: type(base)}


@dataclass(frozen=True)
class _SchedulerCalls:
    """How a pipeline's code calls any scheduler.

    Attributes:
        step: Names of the arguments that it passes to each step.
        scales: It lets the scheduler scale the denoiser's input.
    """

    step: frozenset[str] = frozenset()
    scales: bool = True


@functools.lru_cache(maxsize=256)
def _read_call(pipeline_class: Hashable) -> _SchedulerCalls:
    """Reads the code of a pipeline; calls in other places are assumed to be complete.

    Most inspect the step's signature, and scale. Those for DDPM and DDIM pass arguments that only
    similar schedulers accept; those for latent diffusion and PNDM do not scale.
    """
    try:
        call = inspect.getattr_static(pipeline_class, "__call__")
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return _SchedulerCalls()
    calls = {
        ast.unparse(node.func): [keyword.arg for keyword in node.keywords]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    if "self.scheduler.step" not in calls:
        return _SchedulerCalls()
    names = frozenset(name for name in calls["self.scheduler.step"] if name is not None)
    return _SchedulerCalls(names, scales="self.scheduler.scale_model_input" in calls)


def _suits(calls: _SchedulerCalls, item: tuple[str, type[Any]]) -> bool:
    _, cls = item
    if not calls.step <= inspect.signature(cls.step).parameters.keys():
        return False
    # Schedulers that do not scale have `return sample`.
    scale = getattr(cls, "scale_model_input", None)
    return calls.scales or scale is None or not scale.__code__.co_names
