"""Our own record inside each stored model: where it came from and what it is.

BentoML calls the arguments of its model creation that would hold this deprecated, so it is kept
in a file of ours.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.layout import FORMAT_VERSION, RECORD_FILE

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["pipeline", "lora", "textual_inversion"]


_PACKAGES = ("bentoml-diffusers", "bentoml", "diffusers", "transformers", "peft", "torch")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that make a picture what it is."""
    installed = {name: _find_version(name) for name in _PACKAGES}
    return {name: version for name, version in installed.items() if version}


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a stored model.

    Attributes:
        kind: What the entry is.
        origin: Hub repository, ``"folder NAME"``, ``"file NAME"`` or ``"memory"``.
        revision: Revision asked for, when it came from the hub.
        commit: Commit that the revision stood for, when it came from the hub.
        variant: Variant of the weights, such as ``"fp16"``.
        class_name: Class of the pipeline, as its index names it.
        options: Options stored with the model, as plain values.
        files: sha256 by path relative to the model's folder.
        details: What else is known of an adapter: rank, modules, tokens.
        versions: Versions of the packages that wrote the model.
        format_version: See :mod:`bentoml_diffusers.store.layout`.
    """

    kind: Kind
    origin: str
    revision: str | None = None
    commit: str | None = None
    variant: str | None = None
    class_name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)
    format_version: int = FORMAT_VERSION

    @property
    def source(self) -> str:
        """Origin, revision and variant in words."""
        parts = [self.origin]
        if self.commit or self.revision:
            parts.append(f"at {self.commit or self.revision}")
        if self.variant:
            parts.append(f"variant {self.variant}")
        return " ".join(parts)

    def write(self, folder: Path) -> None:
        """Writes ``record.json`` into a model's folder."""
        (folder / RECORD_FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True))


def read_record(folder: Path) -> Record | None:
    """Reads ``record.json``; ``None`` for a model that BentoML's own module stored.

    Raises:
        InvalidModel: 400, written by a newer format than this code knows.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    if values["format_version"] > FORMAT_VERSION:
        raise InvalidModel(
            folder.name,
            f"has format {values['format_version']}, this version reads up to {FORMAT_VERSION}",
            "upgrade bentoml-diffusers",
        )
    return Record(**values)


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below ``folder``, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hash_file(path: Path) -> str:
    """Returns the sha256 of one file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
