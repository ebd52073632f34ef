"""Describes a pipeline, its scheduler and its guider as parts of a workflow."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import origin_of
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store import code_of_class, hash_tree
from bentoml_diffusers.tasks import is_modular
from bentoml_diffusers.workflow.files import (
    Component,
    Guider,
    Pipeline,
    Scheduler,
    StoredModel,
)
from bentoml_diffusers.workflow.record.attached import find_attached
from bentoml_diffusers.workflow.record.fingerprint import fingerprint_weights
from bentoml_diffusers.workflow.record.values import Encoder, UnsupportedValue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import JsonValue

_OWN_PACKAGES = ("diffusers", "bentoml_diffusers")
_OWN_PARTS = ("scheduler", "guider")  # these are parts of the workflow themselves


def describe_pipeline(pipeline: Any) -> Pipeline:
    """Describes a pipeline and the adapters in it; takes milliseconds."""
    cls = type(pipeline)
    is_of_diffusers = cls.__module__.partition(".")[0] == "diffusers"
    blocks = list(_list_blocks(pipeline.blocks)) if is_modular(pipeline) else []
    return Pipeline(
        class_name=cls.__name__,
        model=_describe_origin(pipeline),
        kind="modular" if blocks else "classic" if is_of_diffusers else "custom",
        weights_sha256=fingerprint_weights(pipeline),
        code_sha256=_hash_code([cls, *(type(block) for _, block in blocks)]),
        blocks=[f"{name}: {type(block).__name__}" for name, block in blocks],
        config=_describe_config(pipeline),
        components={
            name: _describe_component(part)
            for name, part in pipeline.components.items()
            if part is not None and name not in _OWN_PARTS
        },
        attached=find_attached(pipeline),
    )


def describe_scheduler(scheduler: Any, requested: object = None) -> Scheduler | None:
    """Returns class and config of a scheduler, if there is one.

    Args:
        scheduler: The one that runs.
        requested: The scheduler in the request: a name, or a class.
    """
    if scheduler is None:
        return None
    name = requested.__name__ if isinstance(requested, type) else requested
    return Scheduler(
        class_name=type(scheduler).__name__,
        config=plain_config(scheduler),
        requested=None if name is None else str(name),
    )


def describe_guider(guider: Any, **changes: Any) -> Guider | None:
    """Returns class and config of a guider, if there is one.

    Args:
        guider: The pipeline's guider.
        **changes: What a request sets itself; ``None`` is not a change.
    """
    if guider is None:
        return None
    given = {name: value for name, value in changes.items() if value is not None}
    return Guider(class_name=type(guider).__name__, config={**plain_config(guider), **given})


def plain_config(part: Any) -> dict[str, JsonValue]:
    """Returns the config of a scheduler or guider as JSON, without diffusers' internal keys."""
    config = getattr(part, "config", {})
    return {name: _plain(value) for name, value in config.items() if not name.startswith("_")}


def _describe_origin(pipeline: Any) -> StoredModel | None:
    """The hub repository that a pipeline says it is from; paths of folders are not recorded."""
    name = origin_of(pipeline)
    is_repository = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return (
        StoredModel(origin=str(name), tree_sha256=None)
        if is_repository and not Path(str(name)).exists()
        else None
    )


def _describe_config(pipeline: Any) -> dict[str, JsonValue]:
    skipped = set(pipeline.components)
    return {
        name: value
        for name, value in pipeline.config.items()
        if not name.startswith("_")
        and name not in skipped
        and (value is None or isinstance(value, (bool, int, float, str)))
    }


def _describe_component(part: Any) -> Component:
    if not isinstance(part, torch.nn.Module):
        return Component(class_name=type(part).__name__)
    weight = next((one for one in part.parameters() if one.is_floating_point()), None)
    quantization = getattr(getattr(part, "config", None), "quantization_config", None)
    return Component(
        class_name=type(part).__name__,
        dtype=None if weight is None else str(weight.dtype).removeprefix("torch."),
        device=None if weight is None else weight.device.type,
        quantization=None if quantization is None else str(_quantization_name(quantization)),
    )


def _quantization_name(config: Any) -> Any:
    method = getattr(config, "quant_method", None)
    if method is None and isinstance(config, dict):
        method = config.get("quant_method")
    return getattr(method, "value", method) or type(config).__name__


def _list_blocks(block: Any, name: str = "blocks") -> Iterator[tuple[str, Any]]:
    yield name, block
    for key, child in getattr(block, "sub_blocks", {}).items():
        yield from _list_blocks(child, key)


def _hash_code(classes: list[type[Any]]) -> str | None:
    """One hash over the code of all classes from outside of diffusers and this package."""
    foreign = {
        cls.__qualname__: cls
        for cls in classes
        if cls.__module__.partition(".")[0] not in _OWN_PACKAGES
    }
    digests = {name: _hash_class(cls) for name, cls in foreign.items()}
    different = set(digests.values())
    return hash_tree(digests) if len(different) > 1 else next(iter(different), None)


def _hash_class(cls: type[Any]) -> str:
    try:
        code = code_of_class(cls)
    except (InvalidModel, TypeError):  # defined in an interactive session
        code = None
    if code is not None:
        return code.sha256
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        source = cls.__qualname__
    return hashlib.sha256(source.encode()).hexdigest()


def _plain(value: Any) -> JsonValue:
    value = value.tolist() if hasattr(value, "tolist") else value  # a table of betas
    try:
        return Encoder().encode(value)
    except UnsupportedValue:
        return str(value)
