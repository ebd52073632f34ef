"""Finds out whether a tag already holds what an import would store; then nothing is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import TagConflict
from bentoml_diffusers.store.entries import (
    PIPELINE_FOLDER,
    UPSTREAM_MODULE_NAMES,
    Record,
    complete_record,
    find_stored,
    hash_file,
    hash_text,
    read_record,
)
from bentoml_diffusers.store.sources import is_pickle_shard_index

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import bentoml
    from bentoml import Tag

    from bentoml_diffusers.store.code import FoundCode
    from bentoml_diffusers.store.sources import Source

logger = logging.getLogger(__name__)

_IDENTITY = ("kind", "origin", "commit", "variant", "options")


def find_same_model(
    tag: Tag,
    asked: Record,
    source: Source,
    code: FoundCode | None,
    signatures: Mapping[str, Any] | None = None,
) -> bentoml.Model | None:
    """Returns the stored pipeline if it is the same.

    Raises:
        TagConflict: 409, the tag has a version, and holds something else.
    """

    def is_same(model: bentoml.Model, stored: Record) -> bool:
        if (stored.code.sha256 if stored.code else None) != (code.sha256 if code else None):
            return False
        if signatures is not None and set(signatures) != set(model.info.signatures):
            return False
        if stored.details.get("parts") != asked.details.get("parts"):
            return False  # another commit of a repository that the index names
        return asked.commit is not None or _has_same_files(Path(model.path), stored, source)

    found = find_stored(tag)
    if found is not None and _is_same_upstream(found, asked, source, code, signatures):
        logger.info("%s already holds %s, stored by bentoml.diffusers", found.tag, asked.source)
        return found
    return _find(tag, asked, is_same)


def _is_same_upstream(
    model: bentoml.Model,
    asked: Record,
    source: Source,
    code: FoundCode | None,
    signatures: Mapping[str, Any] | None,
) -> bool:
    """True for an entry of BentoML's own module that holds these files; it may hold more."""
    if model.info.module not in UPSTREAM_MODULE_NAMES or code is not None:
        return False
    if signatures is not None and set(signatures) != set(model.info.signatures):
        return False
    stored = model.info.options.to_dict()
    if {key: value for key, value in stored.items() if value} != asked.options:
        return False
    root = Path(model.path, PIPELINE_FOLDER)
    names = source.selection.files
    return all(_may_be_equal(root / name, source.path(name)) for name in names) and all(
        hash_file(root / name) == hash_file(source.path(name)) for name in names
    )


def find_same_details(tag: Tag, asked: Record) -> bentoml.Model | None:
    """Returns the stored entry if it was made from a file with the same hash.

    Raises:
        TagConflict: 409, the tag has a version, and holds something else.
    """
    return _find(tag, asked, lambda _, stored: stored.details == asked.details)


def _find(
    tag: Tag, asked: Record, is_same: Callable[[bentoml.Model, Record], bool]
) -> bentoml.Model | None:
    model = find_stored(tag)
    if model is None:
        return None
    stored = read_record(Path(model.path))
    if (
        stored is not None
        and all(getattr(stored, name) == getattr(asked, name) for name in _IDENTITY)
        and is_same(model, stored)
    ):
        logger.info("%s already holds %s", model.tag, stored.source)
        return model
    if tag.version:
        raise TagConflict(tag, stored.source if stored else "another model", asked.source)
    return None


def _has_same_files(entry: Path, stored: Record, source: Source) -> bool:
    """Compares a folder with the files taken from it; reads only those that could differ."""
    sources = stored.details.get("sources", {})
    names = [name for name in source.selection.files if "/" in name or not name.endswith(".py")]
    plain = [name for name in names if name not in sources]
    written = source.written
    if any(hash_text(text) != stored.files.get(name) for name, text in written.items()):
        return False
    kept = {name for name in stored.files | dict(stored.stamps) if name not in (*sources, *written)}
    converted = [n for n in sources if n.endswith(".bin") or is_pickle_shard_index(n)]
    if len(kept) != len(plain) + len(converted) or not kept.issuperset(plain):
        return False
    root = entry / PIPELINE_FOLDER
    if any(not _may_be_equal(root / name, source.path(name)) for name in plain):
        return False
    if any(hash_file(source.path(name)) != digest for name, digest in sources.items()):
        return False
    different = [n for n in plain if not source.path(n).samefile(root / n)]
    complete = complete_record(entry) if different else stored
    return complete is not None and all(
        hash_file(source.path(name)) == complete.files[name] for name in different
    )


def _may_be_equal(stored: Path, source: Path) -> bool:
    return stored.is_file() and stored.stat().st_size == source.stat().st_size
