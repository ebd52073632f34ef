"""Restores what a call needs from a workflow, which may be untrusted.

Schedulers and guiders come from their recorded class and config; only methods that generate can be
named.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidRequest, InvalidWorkflow
from bentoml_diffusers.workflow.files import Workflow
from bentoml_diffusers.workflow.record import Decoder, plain_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.workflow.files import Guider, Scheduler

_MAX_NUMBER = 10_000  # training steps, entries of a table
_MAX_TEXT = 100


def check_workflow(value: object) -> None:
    """Refuses anything but a workflow, such as its path.

    Raises:
        InvalidRequest: 400, something else.
    """
    if not isinstance(value, Workflow):
        raise InvalidRequest("workflow", value, "a Workflow, as Workflow.load returns it")


def check_method(cls: type[Any], name: str) -> None:
    """Refuses all but methods that generate: ``__call__``, and public ones that take a generator.

    Raises:
        InvalidWorkflow: 400, another one, such as ``save_pretrained``.
    """
    if name == "__call__":
        return
    method = None if name.startswith("_") else getattr(cls, name, None)
    if not inspect.isfunction(method) or "generator" not in inspect.signature(method).parameters:
        raise InvalidWorkflow(
            "workflow.pipeline.method", name, f"a method of {cls.__name__} that takes a generator"
        )


def find_scheduler(recorded: Scheduler, base: Any) -> tuple[type[Any], dict[str, Any]] | None:
    """Returns class and config of a recorded scheduler; ``None`` for the pipeline's own.

    Args:
        recorded: The workflow's.
        base: Scheduler of the pipeline, which determines the compatible classes.

    Raises:
        InvalidWorkflow: 400, a class that does not fit the pipeline, or an invalid config.
    """
    field = "workflow.scheduler"
    known = _names.fitting_schedulers(base)
    cls = known.get(recorded.class_name)
    if cls is None:
        raise InvalidWorkflow(
            f"{field}.class_name", recorded.class_name, f"one of {', '.join(sorted(known))}"
        )
    if cls is type(base) and recorded.config == plain_config(base):
        return None
    config = _check_config(f"{field}.config", cls, recorded.config)
    _check_buildable(field, cls, config)
    return cls, config


def rebuild_guider(recorded: Guider, base: Any) -> Any:
    """Recreates a recorded guider.

    Args:
        recorded: The workflow's.
        base: Guider of the pipeline; it has the same class.

    Raises:
        InvalidWorkflow: 400, another class, or an invalid config.
    """
    field = "workflow.guider"
    if type(base).__name__ != recorded.class_name:
        raise InvalidWorkflow(f"{field}.class_name", recorded.class_name, type(base).__name__)
    config = _check_config(f"{field}.config", type(base), recorded.config)
    return _check_buildable(field, type(base), config, base.config)


def _check_buildable(
    field: str, cls: Any, config: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> Any:
    try:
        return cls.from_config(dict(base or {}), **config)
    except (TypeError, ValueError, KeyError, ImportError, NotImplementedError, ArithmeticError,
            RuntimeError, IndexError, AttributeError) as err:  # fmt: skip
        raise InvalidWorkflow(field, str(err), f"a config of {cls.__name__}") from err


def _check_config(field: str, cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(cls.__init__).parameters
    for name, value in config.items():
        _check_value(f"{field}.{name}", value)
    decoder = Decoder({})
    return {
        name: decoder.decode(value, f"{field}.{name}")
        for name, value in config.items()
        if name in known
    }


def _check_value(field: str, value: Any) -> None:
    if isinstance(value, list):
        if len(value) > _MAX_NUMBER:
            raise InvalidWorkflow(field, f"{len(value)} entries", f"at most {_MAX_NUMBER}")
        for item in value:
            _check_value(field, item)
    if isinstance(value, dict):
        for key, item in value.items():
            _check_value(f"{field}.{key}", item)
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise InvalidWorkflow(field, value, f"at most {_MAX_NUMBER}")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise InvalidWorkflow(field, value, f"at most {_MAX_TEXT} characters")
