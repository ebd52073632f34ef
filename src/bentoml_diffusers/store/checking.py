"""Describes stored models, and checks their files against the stored hashes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.store.code import hash_code, is_trusted
from bentoml_diffusers.store.entries import (
    CODE_FOLDER,
    PIPELINE_FOLDER,
    complete_record,
    hash_files,
    hash_tree,
    list_files,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bentoml

    from bentoml_diffusers.store.entries import Record


@dataclass(frozen=True)
class Check:
    """The result of checking a model's hashes.

    Attributes:
        files: Number of files that were read.
        changed: Files whose content differs from what was stored.
        missing: Files that no longer exist.
        added: Files that were not stored.
    """

    files: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def is_intact(self) -> bool:
        """True if every file is as it was stored."""
        return not (self.changed or self.missing or self.added)


def verify(model: bentoml.Model) -> Check | None:
    """Reads all files of a stored model and compares their hashes.

    Returns:
        The result; ``None`` for a model without a record, stored by BentoML's own module.

    Raises:
        InvalidModel: 400, a file changed before its hash was taken.
    """
    entry = Path(model.path)
    record = complete_record(entry)
    if record is None:
        return None
    found = hash_files(entry / record.folder)
    check = _compare(record.files, found)
    if record.code is not None and hash_code(entry / CODE_FOLDER) != record.code.sha256:
        return Check(check.files, (*check.changed, CODE_FOLDER), check.missing, check.added)
    return check


def hash_of_model(model: bentoml.Model) -> str:
    """Returns the hash over all files of a stored model; computes it first if it is missing."""
    entry = Path(model.path)
    record = complete_record(entry)
    if record is not None and record.tree is not None:
        return record.tree
    return hash_tree(hash_files(entry / (record.folder if record else PIPELINE_FOLDER)))


def describe(model: bentoml.Model) -> dict[str, Any]:
    """Returns what is known about a stored model as plain values; more if it has a record."""
    entry = Path(model.path)
    record = complete_record(entry)
    if record is None:
        return {"tag": str(model.tag), "kind": "pipeline", "origin": "bentoml.diffusers"}
    paths = list_files(entry / record.folder)
    return {
        "tag": str(model.tag),
        "kind": record.kind,
        "class_name": record.class_name,
        "origin": record.origin,
        "revision": record.revision,
        "commit": record.commit,
        "variant": record.variant,
        "components": record.components,
        "repairs": record.repairs,
        "options": record.options,
        "format_version": record.format_version,
        "versions": record.versions,
        "size_bytes": sum(path.stat().st_size for path in paths),
        "tree_sha256": record.tree,
        "code": _describe_code(record),
        "details": record.details,
        "files": record.files,
    }


def _compare(stored: Mapping[str, str], found: Mapping[str, str]) -> Check:
    return Check(
        files=len(found),
        changed=tuple(sorted(p for p in stored if p in found and found[p] != stored[p])),
        missing=tuple(sorted(set(stored) - set(found))),
        added=tuple(sorted(set(found) - set(stored))),
    )


def _describe_code(record: Record) -> dict[str, Any] | None:
    if record.code is None:
        return None
    return {**asdict(record.code), "is_trusted": is_trusted(record.code.sha256)}
