"""What a stored pipeline consists of, read from its index and configs, not its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.store.entries import IP_ADAPTER_FOLDER, MODULAR_INDEX, PIPELINE_FOLDER
from bentoml_diffusers.store.modular import (
    modular_index_from,
    read_modular_components,
    read_modular_index,
)
from bentoml_diffusers.store.sources import class_name, read_classic_index, read_components

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bentoml


@dataclass(frozen=True)
class Index:
    """The index of a classic or modular pipeline.

    Attributes:
        values: Its content.
        components: Library and class of each component, by name.
        is_modular: It is ``modular_model_index.json``.
        name: What messages call the pipeline.
    """

    values: Mapping[str, Any]
    components: Mapping[str, tuple[str, str]]
    is_modular: bool
    name: str

    @property
    def class_name(self) -> str:
        """Name of the pipeline's class."""
        return class_name(self.values)

    def as_modular(self) -> dict[str, Any]:
        """Returns its content as the index of a modular pipeline.

        Raises:
            InvalidModel: 400, diffusers has no modular pipeline for this class.
        """
        return dict(self.values) if self.is_modular else modular_index_from(self.values, self.name)


def read_index(folder: Path, name: str) -> Index:
    """Reads the index of a stored pipeline.

    Args:
        folder: The pipeline's.
        name: What messages call it.

    Raises:
        InvalidModel: 400, there is none, or it is broken.
    """
    if (folder / MODULAR_INDEX).is_file():
        values = read_modular_index(folder, name)
        found = read_modular_components(values, name)
        kinds = {key: (one.library, one.class_name) for key, one in found.items()}
        return Index(values, kinds, True, name)
    values = read_classic_index(folder, name)
    return Index(values, read_components(values, name), False, name)


def read_component_classes(model: bentoml.Model) -> dict[str, str]:
    """Returns the class of each component of a pipeline, classic or modular, by name.

    Raises:
        InvalidModel: 400, an index that cannot be read.
    """
    index = read_index(Path(model.path_of(PIPELINE_FOLDER)), str(model.tag))
    return {name: kind for name, (_, kind) in index.components.items()}


def has_ip_adapter(model: bentoml.Model) -> bool:
    """True if an IP-Adapter is stored with the pipeline."""
    return Path(model.path_of(PIPELINE_FOLDER), IP_ADAPTER_FOLDER).is_dir()


def read_config(model: bentoml.Model, component: str) -> dict[str, Any]:
    """Returns the config of a component; empty where it has none that can be read."""
    path = Path(model.path_of(PIPELINE_FOLDER), component, "config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
