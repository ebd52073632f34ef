"""Finds stored adapters by name, fast enough for every request.

BentoML reads and validates a YAML file at each look-up of a model, which takes longer than
switching a LoRA. Here a result is cached until the folder of the name changes: versions come and
go by a rename in it, and never change.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import bentoml
from bentoml import Tag

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries.layout import ADAPTER_FOLDER, RECORD_FILE
from bentoml_diffusers.store.entries.record import Kind, read_record

_Stamp = tuple[int, int, int]  # mtime, ctime, inode


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of the store.

    Attributes:
        tag: Its tag, with the version.
        path: Its file.
        token: Token of a textual inversion, where its file or its import names one.
        components: Denoisers that a LoRA is for, where its import names them.
    """

    tag: str
    path: Path
    token: str | None
    components: tuple[str, ...] = ()


def find_adapter(name: str, kind: Kind) -> StoredAdapter | None:
    """Returns the adapter with a tag; ``None`` if the store has none of that kind.

    Args:
        name: ``"name"`` for the latest version, or ``"name:version"``.
        kind: Kind of the entry.
    """
    try:
        folder = _compat.model_store().root / Tag.from_str(name).name
        stamps = _stamp(folder), _stamp(folder / "latest")
        find = _find if stamps[0] else _find.__wrapped__  # a bento may know it by another name
        return find(name, kind, folder, stamps)
    except (bentoml.exceptions.BentoMLException, ValueError):
        return None


def list_names() -> list[str]:
    """Returns the names of all entries of the store, of every kind."""
    with os.scandir(_compat.model_store().root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def has_adapter(name: str, kind: Kind) -> bool:
    """True if any version of a name is an adapter of that kind."""
    records = (_compat.model_store().root / name).glob(f"*/{RECORD_FILE}")
    return any(_read_kind(path.parent, _stamp(path)) == kind for path in records)


@functools.lru_cache(maxsize=4096)
def _find(name: str, kind: Kind, _folder: Path, _stamps: object) -> StoredAdapter:
    model = bentoml.models.get(name)
    folder = Path(model.path)
    record = read_record(folder)
    if record is None or record.kind != kind:  # said by an error, which is not kept
        raise InvalidModel(model.tag, f"is not a {kind}")
    file = next((folder / ADAPTER_FOLDER).iterdir())
    components = tuple(record.details.get("loaded_into", ()))
    return StoredAdapter(str(model.tag), file, record.details.get("token"), components)


@functools.lru_cache(maxsize=16384)
def _read_kind(folder: Path, _stamp: _Stamp | None) -> Kind | None:
    try:
        record = read_record(folder)
    except InvalidModel:
        return None
    return record.kind if record else None


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
