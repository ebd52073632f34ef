"""Names of schedulers, as diffusers and as AUTOMATIC1111's web UI write them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import DiffusersError, InvalidRequest, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin

# Sampler names of AUTOMATIC1111, as in the table of diffusers' documentation
# (docs/source/en/api/schedulers/overview.md).
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
}
_SIGMAS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas",
           "beta": "use_beta_sigmas"}  # fmt: skip


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler for one request.

    Attributes:
        cls: Its class.
        changes: What differs from the config of the model's scheduler.
    """

    cls: type[SchedulerMixin]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def build(self, base: SchedulerMixin) -> SchedulerMixin:
        """Returns the scheduler, on the config of ``base``."""
        scheduler: SchedulerMixin = self.cls.from_config(base.config, **self.changes)
        return scheduler


def choose_scheduler(name: str | type[Any] | None, base: SchedulerMixin) -> SchedulerChoice | None:
    """Returns the scheduler that a request names; ``None`` for the model's own.

    Args:
        name: A class, a name that diffusers exports, or a sampler's name such as
            ``"DPM++ 2M Karras"``; case does not matter.
        base: The model's scheduler.

    Raises:
        InvalidRequest: 400, an unknown name, or one that does not fit the model.
    """
    if name is None:
        return None
    if not isinstance(name, (str, type)):
        raise InvalidRequest("scheduler", name, "the name of a scheduler")
    choice = _find_sampler(name) if isinstance(name, str) else None
    if choice is None:
        choice = SchedulerChoice(_find_class(name))
    fitting = {*base.compatibles, type(base)}
    if choice.cls not in fitting:
        names = ", ".join(sorted(one.__name__ for one in fitting))
        raise InvalidRequest("scheduler", name, f"one that fits this model: {names}")
    try:
        choice.build(base)
    except (ImportError, ValueError) as err:  # some need scipy
        raise InvalidRequest("scheduler", name, f"another one: {err}") from err
    return choice


def _find_class(name: str | type[Any]) -> type[SchedulerMixin]:
    try:
        return _names.resolve_scheduler_class(name)
    except DiffusersError as err:
        near = suggest(name.lower(), _SAMPLERS) if isinstance(name, str) else ""
        raise InvalidRequest(
            "scheduler", name, f"a scheduler that diffusers exports, or a sampler's name{near}"
        ) from err


def _find_sampler(name: str) -> SchedulerChoice | None:
    words = " ".join(name.lower().replace("_", " ").split())
    sampler, _, last = words.rpartition(" ")
    option = _SIGMAS.get(last)
    known = _SAMPLERS.get(sampler if option else words)
    if known is None:
        return None
    cls = _names.resolve_scheduler_class(known[0])
    changes = dict(known[1])
    if option:
        if option not in _parameters(cls):
            raise InvalidRequest("scheduler", name, f"{sampler!r} without {last!r}")
        changes |= {flag: flag == option for flag in _SIGMAS.values() if flag in _parameters(cls)}
    return SchedulerChoice(cls, changes)


def _parameters(cls: type[SchedulerMixin]) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)
