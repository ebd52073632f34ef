"""Reading the file of an adapter."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from bentoml_diffusers.adapters.sources import Adapter


def file_key(adapter: Adapter) -> object:
    """Returns what tells the content of an adapter from others: place, time and size."""
    arguments = tuple(sorted((key, repr(value)) for key, value in adapter.arguments.items()))
    try:
        found = os.stat(adapter.path)
    except OSError:
        return adapter.path, arguments
    return adapter.path, found.st_mtime_ns, found.st_size, arguments


def local_file(adapter: Adapter) -> Path:
    """Returns the file of an adapter, downloaded if the operator allowed the hub.

    Raises:
        InvalidModel: 400, there is none.
    """
    path = Path(adapter.path)
    if path.is_file():
        return path
    # A folder or a repository of the hub, which the operator allowed.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    weight_name = str(adapter.arguments.get("weight_name", "pytorch_lora_weights.safetensors"))
    if path.is_dir():
        return path / weight_name
    revision = adapter.arguments.get("revision")
    try:
        return Path(hf_hub_download(adapter.path, weight_name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as err:
        raise InvalidModel(
            adapter.name, f"could not be downloaded: {type(err).__name__}", "check its weight_name"
        ) from err


def read_header(name: str, path: Path) -> tuple[list[str], dict[str, str]]:
    """Returns the names of the tensors in a file, and what else it says about itself.

    Raises:
        InvalidModel: 400, the file is broken or gone.
    """
    from safetensors import safe_open

    with _broken(name, path), safe_open(path, framework="pt") as tensors:
        about = dict(tensors.metadata() or {})
        about.pop("format", None)
        return list(tensors.keys()), about


def read_tensors(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file into memory of their own.

    Raises:
        InvalidModel: 400, the file is broken or gone.
    """
    from safetensors.torch import load

    with _broken(name, path):
        return load(path.read_bytes())


@contextlib.contextmanager
def _broken(name: str, path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as err:
        reason = str(err).replace(str(path), name)[:300]
        raise InvalidModel(name, f"is broken or truncated: {reason}") from err
