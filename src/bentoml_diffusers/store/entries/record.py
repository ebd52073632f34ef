"""Our own record inside each stored model: where it came from and what it is.

BentoML has deprecated the arguments of its model creation that could hold this, so it is kept
in a file of our own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries.layout import (
    ADAPTER_FOLDER,
    FORMAT_VERSION,
    PIPELINE_FOLDER,
    RECORD_FILE,
)

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["pipeline", "lora", "textual_inversion"]


_PACKAGES = ("bentoml-diffusers", "bentoml", "diffusers", "transformers", "peft", "torch")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that an image depends on."""
    installed = {name: _compat.find_version(name) for name in _PACKAGES}
    return {name: version for name, version in installed.items() if version}


@dataclass(frozen=True, kw_only=True)
class Code:
    """Pipeline code that is stored with a model.

    Attributes:
        origin: File, community name or hub repository that it came from.
        entry: File in ``code/`` that defines the pipeline.
        class_name: Class in it; ``None``: the only pipeline class in the file.
        sha256: Hash over all files in ``code/``; the name of the module is made from it.
    """

    origin: str
    entry: str
    class_name: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about a stored model.

    Attributes:
        kind: What the entry is.
        origin: Hub repository, ``"folder NAME"``, ``"file NAME"`` or ``"memory"``.
        revision: Revision asked for, when it came from the hub.
        commit: Commit that the revision pointed to, when it came from the hub.
        variant: Variant of the weights, such as ``"fp16"``.
        class_name: Class of the pipeline, as its index names it.
        components: ``"library.Class"`` of each component, by its name.
        code: Pipeline code that is stored with the model.
        repairs: What had to be repaired so that the model loads, as text.
        options: Options stored with the model, as plain values.
        files: sha256 by path relative to the folder of the pipeline or adapter.
        tree: One hash over ``files``; ``None`` while hashes are missing.
        stamps: Size, modification time (ns) and inode of the files that share their disk blocks
            with the source, and of those whose hash is missing, by path.
        details: What else is known of an adapter: rank, modules, tokens.
        versions: Versions of the packages that wrote the model.
        format_version: See :mod:`bentoml_diffusers.store.entries.layout`.
    """

    kind: Kind
    origin: str
    revision: str | None = None
    commit: str | None = None
    variant: str | None = None
    class_name: str | None = None
    components: dict[str, str] = field(default_factory=dict)
    code: Code | None = None
    repairs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tree: str | None = None
    stamps: dict[str, list[int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)
    format_version: int = FORMAT_VERSION

    @property
    def source(self) -> str:
        """Origin, revision and variant as text."""
        parts = [self.origin]
        if self.commit or self.revision:
            parts.append(f"at {self.commit or self.revision}")
        if self.variant:
            parts.append(f"variant {self.variant}")
        return " ".join(parts)

    @property
    def folder(self) -> str:
        """Folder of the entry that ``files`` are in."""
        return PIPELINE_FOLDER if self.kind == "pipeline" else ADAPTER_FOLDER

    def write(self, folder: Path) -> None:
        """Writes ``record.json`` into a model's folder, atomically."""
        temporary = folder / f".{RECORD_FILE}-{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=2, sort_keys=True))
        temporary.replace(folder / RECORD_FILE)


def read_record(folder: Path) -> Record | None:
    """Reads ``record.json``; ``None`` for a model that BentoML's own module stored.

    Raises:
        InvalidModel: 400, written by a newer format than this code knows, or broken.
    """
    path, tag = folder / RECORD_FILE, f"{folder.parent.name}:{folder.name}"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise InvalidModel(
                tag,
                f"has format {version}, this version reads up to {FORMAT_VERSION}",
                "upgrade bentoml-diffusers",
            )
        code = values.get("code")
        return Record(**{**values, "code": Code(**code) if code else None})
    except (ValueError, KeyError, TypeError) as err:
        if isinstance(err, InvalidModel):
            raise
        raise InvalidModel(
            tag, f"has a broken {RECORD_FILE}: {err}", "import the model again"
        ) from err
