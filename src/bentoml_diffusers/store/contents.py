"""What a stored pipeline is made of, read from its index and configs; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.store.entries import IP_ADAPTER_FOLDER, MODULAR_INDEX, PIPELINE_FOLDER
from bentoml_diffusers.store.modular import (
    modular_index_from,
    read_modular_components,
    read_modular_index,
)
from bentoml_diffusers.store.sources import read_index

if TYPE_CHECKING:
    import bentoml


def read_component_classes(model: bentoml.Model) -> dict[str, str]:
    """Returns the class of each component by its name, of a classic or a modular pipeline.

    Raises:
        InvalidModel: 400, an index that cannot be read.
    """
    folder, name = Path(model.path_of(PIPELINE_FOLDER)), str(model.tag)
    if (folder / MODULAR_INDEX).is_file():
        index = read_modular_index(folder, name)
    else:
        index = modular_index_from(read_index(folder, name), name)
    found = read_modular_components(index, name)
    return {key: component.class_name for key, component in found.items()}


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
