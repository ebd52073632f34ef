"""A folder with a pipeline: its index and files, checked for completeness."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import PIPELINE_INDEX
from bentoml_diffusers.store.sources.selection import (
    BY_DEFAULT,
    Selection,
    WeightChoice,
    check_name,
    select_files,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEVER_STORED = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
_MAX_HEADER = 100 << 20  # bytes, as in the safetensors format


@dataclass(frozen=True)
class Place:
    """Location of a component's files: a subfolder (``""``: the root) of a folder."""

    folder: Path
    subfolder: str


@dataclass(frozen=True)
class Source:
    """A folder that can be imported.

    Attributes:
        name: What messages call it.
        folder: Its path.
        index: Content of its index; of a modular pipeline, of the index that is stored.
        selection: The files to take, by their names in the entry.
        places: For a modular pipeline: the location of each component.
        written: Files of the entry that are written instead of copied, and their text.
    """

    name: str
    folder: Path
    index: dict[str, Any]
    selection: Selection
    places: Mapping[str, Place] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Returns the real path of a file, symlinks resolved."""
        component, _, rest = name.partition("/")
        place = self.places.get(component) if rest else None
        if place is None:
            return (self.folder / name).resolve()
        return (place.folder / place.subfolder / rest).resolve()

    def root(self, name: str) -> Path:
        """Returns the folder, or the snapshot of a repository, that a file belongs to."""
        place = self.places.get(name.partition("/")[0])
        return self.folder if place is None else place.folder

    def known_hash(self, name: str) -> str | None:
        """Returns the sha256 of a file in the hub's cache, which is named by it."""
        path = self.path(name)
        is_hash = path.parent == hub_blobs(self.root(name)) and len(path.name) == 64
        return path.name if is_hash else None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an import asks for.

    Attributes:
        source: A folder, or ``owner/name`` of a repository of the hub.
        weights: Which of its weights to take.
        revision: Branch, tag or commit of the repository.
        proxies: Proxies for the hub, by protocol; for the time of a download they are those of
            the process.
        custom_pipeline: Pipeline code to store with it.
        modular: A modular pipeline is wanted, where the source could be both.
    """

    source: str
    weights: WeightChoice = BY_DEFAULT
    revision: str = "main"
    proxies: Mapping[str, str] | None = None
    custom_pipeline: str | None = None
    modular: bool = False


def open_folder(folder: Path, *, name: str, weights: WeightChoice) -> Source:
    """Inspects a folder before any file is taken from it.

    Raises:
        InvalidModel: 400, no readable index, a missing component or variant, a symlink that
            points outside, a truncated file.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    index = read_classic_index(folder, name)
    selection = select_files(index, list_names(folder), source=name, weights=weights)
    source = Source(name, folder, index, selection)
    for file in selection.files:
        check_file(source, file)
    return source


def read_classic_index(folder: Path, name: str) -> dict[str, Any]:
    """Reads ``model_index.json``.

    Raises:
        InvalidModel: 400, there is none, or it is broken.
    """
    index = read_json(folder / PIPELINE_INDEX, name)
    if not index.get("_class_name"):
        raise InvalidModel(name, f"has a {PIPELINE_INDEX} that does not name a class")
    return index


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads an index or a config of a pipeline.

    Raises:
        InvalidModel: 400, there is none, or it is not a JSON object.
    """
    if not path.is_file():
        raise InvalidModel(
            name,
            f"is not a diffusers pipeline: it has no {path.name}",
            "give a folder that save_pretrained wrote",
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as err:
        raise InvalidModel(name, f"has a broken {path.name}: {err}") from err
    if not isinstance(content, dict):
        raise InvalidModel(name, f"has a {path.name} that is not a JSON object")
    return content


def class_name(index: Mapping[str, Any]) -> str:
    """Returns the name of the pipeline's class."""
    value = index["_class_name"]
    return str(value[-1] if isinstance(value, list) else value)


def list_names(folder: Path) -> list[str]:
    """Returns all files below a folder as relative paths; symlinks to folders are refused."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(item for item in folders if item not in _NEVER_STORED)
        names += [Path(root, file).relative_to(folder).as_posix() for file in files]
        for item in [item for item in folders if Path(root, item).is_symlink()]:
            raise InvalidModel(
                folder.name,
                f"has a symlink to a folder: {item}",
                "replace it with the files themselves",
            )
    return sorted(names)


def hub_blobs(folder: Path) -> Path | None:
    """Returns the folder that the symlinks of a snapshot in the hub's cache point to."""
    resolved = folder.resolve()
    is_snapshot = resolved.parent.name == "snapshots"
    return resolved.parent.parent / "blobs" if is_snapshot else None


def check_safetensors(path: Path, name: str, source: str) -> None:
    """Checks header and length of a safetensors file, without reading its tensors.

    Raises:
        InvalidModel: 400, corrupt or truncated.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes, its header says {expected}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
        raise InvalidModel(
            source, f"has a broken or truncated file {name}: {err}", "download or save it again"
        ) from err


def check_file(source: Source, name: str) -> None:
    """Checks that a file is inside its folder and complete.

    Raises:
        InvalidModel: 400, a symlink that points outside or dangles, or a truncated file.
    """
    path = source.path(name)
    root = source.root(name)
    allowed = (root.resolve(), hub_blobs(root))
    if not any(path.is_relative_to(root) for root in allowed if root is not None):
        raise InvalidModel(
            source.name,
            f"has a symlink that points outside of it: {name}",
            "replace it with the file itself",
        )
    if not path.is_file():
        raise InvalidModel(source.name, f"has a dangling symlink: {name}")
    if name.endswith(".safetensors"):
        check_safetensors(path, name, source.name)
    if ".index." in name and name.endswith(".json"):
        _check_shards(source, name)


def _check_shards(source: Source, name: str) -> None:
    """Checks that all shards that an index of weights names are in its folder."""
    try:
        shards = set(json.loads(source.path(name).read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as err:
        raise InvalidModel(source.name, f"has a broken {name}: {err}") from err
    for shard in sorted(map(str, shards)):
        check_name(source.name, shard)
        path = f"{name.rpartition('/')[0]}/{shard}"
        if path not in source.selection.files:
            raise InvalidModel(source.name, f"lacks {path}, which {name} names")
