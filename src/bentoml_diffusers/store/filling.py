"""Fills the folder of a new entry, and returns its whole record."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from bentoml_diffusers.store.contents import read_index
from bentoml_diffusers.store.entries import (
    PIPELINE_FOLDER,
    SMALL_BYTES,
    hash_file,
    with_hashes,
)
from bentoml_diffusers.store.modular import (
    has_ip_adapter,
    refuse_ip_adapters,
    without_ip_adapters,
    write_ip_adapters,
)
from bentoml_diffusers.store.omissions import write_left_out
from bentoml_diffusers.store.repairs import REPAIRED_FILES, repair_pipeline
from bentoml_diffusers.store.sources import (
    convert_pickle,
    convert_shard_index,
    converted_name,
    is_pickle_shard_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.store.code import FoundCode
    from bentoml_diffusers.store.entries import Linker, Record
    from bentoml_diffusers.store.sources import Source


def fill_from_folder(
    entry: Path, record: Record, source: Source, code: FoundCode | None, linker: Linker
) -> Record:
    """Takes the selected files of a folder.

    Raises:
        InvalidModel: 400, a pickle that holds more than tensors.
        StorageFull: 507, no space left.
    """
    root = entry / PIPELINE_FOLDER
    known: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name in source.selection.files:
        path = source.path(name)
        if name in source.selection.pickles or is_pickle_shard_index(name):
            sources[name] = hash_file(path)
            _convert(path, root / converted_name(name), name)
        elif not (name.endswith(".py") and "/" not in name):  # that goes to `code/`
            digest = source.known_hash(name)
            linker.place(path, root / name, name, is_frozen=digest is not None)
            if digest is not None and path.stat().st_size >= SMALL_BYTES:
                known[name] = digest
    for name, text in source.written.items():
        (root / name).write_text(text)
    originals = {name: hash_file(root / name) for name in REPAIRED_FILES if (root / name).is_file()}
    record = finish_record(entry, record, code, known, linker.linked)
    if record.repairs:
        sources.update(originals)
    return replace(record, details={**record.details, "sources": sources}) if sources else record


def fill_from_pipeline(
    entry: Path, record: Record, pipeline: DiffusionPipeline, code: FoundCode | None = None
) -> Record:
    """Writes a pipeline from memory, as safetensors, with its IP-Adapters.

    Raises:
        InvalidModel: 400, an IP-Adapter or a component that could not be loaded again.
    """
    root = entry / PIPELINE_FOLDER
    unet = getattr(pipeline, "unet", None)
    refuse_ip_adapters(type(pipeline).__name__, pipeline.components)
    if has_ip_adapter(unet):
        write_ip_adapters(unet, root)
    with without_ip_adapters(unet) if has_ip_adapter(unet) else contextlib.nullcontext():
        pipeline.save_pretrained(root, safe_serialization=True)
    write_left_out(pipeline, root)
    return finish_record(entry, record, code)


def finish_record(
    entry: Path,
    record: Record,
    code: FoundCode | None = None,
    known: Mapping[str, str] | None = None,
    linked: set[str] | None = None,
) -> Record:
    """Repairs what was written, stores its code, and returns the complete record."""
    root = entry / PIPELINE_FOLDER
    repairs = repair_pipeline(root)
    record = replace(
        record,
        repairs=repairs,
        components={
            key: ".".join(kind) for key, kind in read_index(root, entry.name).components.items()
        },
        code=code.store(entry) if code is not None else None,
    )
    return with_hashes(record, root, known or {}, linked or set())


def _convert(source: Path, target: Path, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_pickle_shard_index(name):
        convert_shard_index(source, target)
    else:
        convert_pickle(source, target, name)
