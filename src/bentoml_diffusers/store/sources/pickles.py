"""Pickled weights -> safetensors, so that nothing in the store is a pickle.

Only tensors are read (``torch.load(weights_only=True)``); a file that needs more is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from pathlib import Path


def convert_pickle(source: Path, target: Path, name: str) -> None:
    """Writes the tensors of a pickle as safetensors, bit for bit.

    Args:
        source: A file that ``torch.save`` wrote.
        target: Target file.
        name: Name of the file, for messages.

    Raises:
        InvalidModel: 400, it holds more than tensors, or cannot be read.
    """
    from safetensors.torch import save_file

    save_file(read_pickle(source, name), target, metadata={"format": "pt"})


def read_pickle(path: Path, name: str) -> dict[str, Any]:
    """Returns the tensors of a pickle by name, none sharing memory with another.

    Raises:
        InvalidModel: 400, it holds more than tensors, or cannot be read.
    """
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as err:
        raise InvalidModel(
            name, "cannot be read as tensors only, so it is refused", "convert it to safetensors"
        ) from err
    tensors = flatten(content)
    if not tensors:
        raise InvalidModel(name, "holds no tensors")
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def flatten(content: Any) -> dict[str, Any]:
    """Returns all tensors of nested mappings; a ``state_dict`` replaces its parent."""
    import torch

    if not isinstance(content, dict):
        return {}
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            found[str(key)] = value
        elif isinstance(value, dict):
            found.update({f"{key}.{inner}": item for inner, item in flatten(value).items()})
    return found


def converted_name(name: str) -> str:
    """Returns the name by which diffusers and transformers look for the safetensors of a pickle."""
    folder, slash, base = name.rpartition("/")
    if base.startswith("pytorch_model"):
        base = base.replace("pytorch_model", "model", 1)
    if base.endswith(".json"):
        return f"{folder}{slash}{base.replace('.bin.index', '.safetensors.index')}"
    return f"{folder}{slash}{base.rpartition('.')[0]}.safetensors"


def is_pickle_shard_index(name: str) -> bool:
    """True for ``pytorch_model.bin.index.json`` and its variants."""
    return ".bin.index." in name and name.endswith(".json")


def convert_shard_index(source: Path, target: Path) -> None:
    """Writes an index of pickled shards as one of their safetensors."""
    index = json.loads(source.read_text())
    shards = {key: converted_name(name) for key, name in index["weight_map"].items()}
    target.write_text(json.dumps({**index, "weight_map": shards}))
