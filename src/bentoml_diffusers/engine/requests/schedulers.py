"""The scheduler that a request names."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.engine.requests.scheduler_calls import fitting_schedulers
from bentoml_diffusers.errors import DiffusersError, InvalidRequest, suggest_one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin

_LONGEST_NAME = 64  # compare only so many characters of an unknown name with the known ones


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler for one request.

    Attributes:
        cls: Its class.
        changes: Changes to the config of the model's scheduler.
        example: One that was built, for inspection.
    """

    cls: type[SchedulerMixin]
    changes: Mapping[str, Any] = field(default_factory=dict)
    example: SchedulerMixin | None = field(default=None, compare=False, repr=False)

    def build(self, base: SchedulerMixin) -> SchedulerMixin:
        """Returns the scheduler, on the config of ``base``."""
        scheduler: SchedulerMixin = self.cls.from_config(base.config, **self.changes)
        return scheduler


def choose_scheduler(
    name: str | type[Any] | SchedulerChoice | None,
    base: SchedulerMixin,
    pipeline_class: type[Any] | None = None,
) -> SchedulerChoice | None:
    """Returns the scheduler that a request names; ``None`` for the model's own.

    Args:
        name: A class, a name that diffusers exports, or a sampler's name such as
            ``"DPM++ 2M Karras"``; case does not matter. A SchedulerChoice is returned unchanged.
        base: The model's scheduler.
        pipeline_class: Class of the pipeline that calls it; ``None``: any.

    Raises:
        InvalidRequest: 400, an unknown name, or one that does not fit the model.
    """
    if name is None or isinstance(name, SchedulerChoice):
        return name
    if not isinstance(name, (str, type)):
        raise InvalidRequest("scheduler", name, "the name of a scheduler, as a string")
    choice = _find_sampler(name) if isinstance(name, str) else None
    if choice is None:
        choice = SchedulerChoice(_find_class(name, base))
    fitting = fitting_schedulers(base, pipeline_class)
    if choice.cls not in fitting.values():
        names = ", ".join(sorted(fitting))
        raise InvalidRequest("scheduler", name, f"one that fits this model: {names}")
    try:
        return replace(choice, example=choice.build(base))
    except (ImportError, ValueError) as err:
        raise InvalidRequest("scheduler", name, f"another one: {err}") from err


def example_of(
    choice: SchedulerChoice | None, base: SchedulerMixin | None
) -> SchedulerMixin | None:
    """Returns a scheduler like that of a request, for inspection."""
    if choice is None or base is None:
        return base
    return choice.example or choice.build(base)


def _find_class(name: str | type[Any], base: SchedulerMixin) -> type[SchedulerMixin]:
    try:
        return _names.resolve_scheduler_class(name)
    except DiffusersError as err:
        packages = _names.missing_packages(name)
        if packages:
            wanted = f"another one: it needs {packages}, which is not installed here"
            raise InvalidRequest("scheduler", name, wanted) from err
        near = _suggest(name, base) if isinstance(name, str) else ""
        raise InvalidRequest(
            "scheduler", name, f"a scheduler that diffusers exports, or a sampler's name{near}"
        ) from err


def list_scheduler_names(base: SchedulerMixin | None) -> list[str]:
    """Returns all names that a request may give for a model with this scheduler."""
    if base is None:
        return []
    fitting = fitting_schedulers(base)
    names = sorted(fitting)  # diffusers keeps them in a set
    for sampler, (class_name, _) in _names.SAMPLERS.items():
        if class_name in fitting:
            known = _parameters(fitting[class_name])
            sigmas = [suffix for suffix, flag in _names.SIGMAS.items() if flag in known]
            names += [sampler, *(f"{sampler} {suffix}" for suffix in sigmas)]
    return names


def _suggest(name: str, base: SchedulerMixin) -> str:
    """Suggests the nearest of the names that a request for this model can use."""
    by_lower = {one.lower(): one for one in list_scheduler_names(base)}
    words = " ".join(name[:_LONGEST_NAME].lower().replace("_", " ").split())
    near = difflib.get_close_matches(words, by_lower, n=3)
    return suggest_one_of(by_lower[one] for one in near)


def _find_sampler(name: str) -> SchedulerChoice | None:
    words = " ".join(name.lower().replace("_", " ").split())
    sampler, _, last = words.rpartition(" ")
    option = _names.SIGMAS.get(last.capitalize())
    known = _names.find_sampler(sampler if option else words)
    if known is None:
        return None
    cls = _names.resolve_scheduler_class(known[0])
    changes = dict(known[1])
    if option:
        if option not in _parameters(cls):
            raise InvalidRequest("scheduler", name, f"{sampler!r} without {last!r}")
        flags = _names.SIGMAS.values()
        changes |= {flag: flag == option for flag in flags if flag in _parameters(cls)}
    return SchedulerChoice(cls, changes)


def _parameters(cls: type[SchedulerMixin]) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)
