"""The static adapters of a service, by the versions that its bento was built with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bentoml import Tag

    from bentoml_diffusers.options import ModelOptions

_FIELDS = ("lora_weights", "textual_inversions")


def pin_adapters(options: ModelOptions, tags: Iterable[Tag]) -> dict[str, Any]:
    """Returns the options of adapters, each named by its version if it is one of ``tags``."""
    versions = {name: str(tag) for tag in tags for name in (tag.name, f"{tag.name}:latest")}
    given = {name: getattr(options, name) for name in _FIELDS}
    return {name: _pin(value, versions) for name, value in given.items() if value is not None}


def _pin(value: Any, versions: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return versions.get(value.strip(), value)
    if not isinstance(value, Mapping):
        return [_pin(one, versions) for one in value]
    if "weight_name" in value:
        return value  # a file of a folder, not of the store
    names = {key: _pin(value[key], versions) for key in ("name", "model_name") if key in value}
    return {**value, **names}
