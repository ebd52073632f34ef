"""Which schedulers a pipeline can step: what its own code does with them."""

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
    """Returns the classes, by name, that a request of a pipeline can have.

    Args:
        base: The model's scheduler.
        pipeline_class: Class of the pipeline that calls them; ``None``: any.
    """
    suits = functools.partial(_suits, _read_call(cast("Hashable", pipeline_class)))
    fitting = _names.fitting_schedulers(base)
    return {**dict(filter(suits, fitting.items())), type(base).__name__: type(base)}


@dataclass(frozen=True)
class _SchedulerCalls:
    """What a pipeline does with its scheduler, whatever scheduler that is.

    Attributes:
        step: Names of the arguments that it gives each step.
        scales: It has the scheduler scale what goes into the denoiser.
    """

    step: frozenset[str] = frozenset()
    scales: bool = True


@functools.lru_cache(maxsize=256)
def _read_call(pipeline_class: Hashable) -> _SchedulerCalls:
    """Reads the code of a pipeline; what is written elsewhere is taken for complete.

    Most ask first what a step takes, and scale. DDPM's and DDIM's give arguments that only
    schedulers of their kind take; latent diffusion's and PNDM's scale nothing.
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
    # That of schedulers which scale nothing is `return sample`.
    scale = getattr(cls, "scale_model_input", None)
    return calls.scales or scale is None or not scale.__code__.co_names
