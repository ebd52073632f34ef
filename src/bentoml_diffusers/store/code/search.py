"""Code of pipelines and blocks that a model brings: found, hashed, stored, never executed."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers._compat import find_version
from bentoml_diffusers.errors import InvalidModel, InvalidOption, UntrustedSource
from bentoml_diffusers.store.code.imports import with_imports
from bentoml_diffusers.store.entries import (
    BLOCKS_CONFIG,
    CODE_FOLDER,
    MODULAR_INDEX,
    Code,
    hash_file,
    hash_tree,
)
from bentoml_diffusers.store.sources import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bentoml_diffusers.store.sources import Source

ENTRY_FILE = "pipeline.py"
_BLOCKS = "ModularPipelineBlocks"
_COMMUNITY = "diffusers/community-pipelines-mirror"


@dataclass(frozen=True)
class FoundCode:
    """Code that was found; it has not been executed.

    Attributes:
        origin: Where it came from, without paths of this machine.
        files: Its files by their names in ``code/``.
        entry: The one with the pipeline.
        class_name: Class in it, if the index or the config names one.
        of_blocks: True for the code of a modular pipeline's blocks.
    """

    origin: str
    files: Mapping[str, Path]
    entry: str
    class_name: str | None = None
    of_blocks: bool = False

    @property
    def sha256(self) -> str:
        """Hash over all its files."""
        return hash_tree({name: hash_file(path) for name, path in self.files.items()})

    def store(self, entry: Path) -> Code:
        """Copies the code into an entry of the store."""
        folder = entry / CODE_FOLDER
        folder.mkdir()
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)
        return Code(
            origin=self.origin,
            entry=self.entry,
            class_name=self.class_name,
            sha256=hash_code(folder),
        )


def hash_code(folder: Path) -> str:
    """Returns the hash over all files of a folder with code, without trusting a record."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return hash_tree({path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def brings_blocks(custom_pipeline: str | None) -> bool:
    """True for a folder with the code of blocks."""
    path = Path(custom_pipeline).expanduser() if custom_pipeline else None
    return path is not None and (path / BLOCKS_CONFIG).is_file()


def find_code(
    custom_pipeline: str | None, source: Source | None, *, trust_remote_code: bool
) -> FoundCode | None:
    """Finds the code of a pipeline, the one asked for, else the one that the index names.

    Args:
        custom_pipeline: A file, a folder with ``pipeline.py`` or with blocks, the name of a file
            in the source, the name of a community pipeline, or a hub repository.
        source: Folder of the model.
        trust_remote_code: Allows code from the hub.

    Raises:
        InvalidModel: 400, the source names a file that is not there.
        InvalidOption: 400, no such code.
        UntrustedSource: 400, code from the hub without trust.
        HubUnavailable: 503, the hub could not be reached.
    """
    if custom_pipeline in _names.BUNDLED_PIPELINES:
        return None
    if custom_pipeline is None:
        return None if source is None else _declared_code(source)
    path = Path(custom_pipeline).expanduser()
    if source is not None and (source.folder / f"{custom_pipeline}.py").is_file():
        check = source.path(f"{custom_pipeline}.py")
        return FoundCode(f"{source.name}/{check.name}", {check.name: check}, check.name)
    if path.is_dir():
        return _folder_code(path)
    if path.suffix == ".py":
        if not path.is_file():
            raise InvalidOption("custom_pipeline", custom_pipeline, "a file that exists")
        return FoundCode(f"file {path.name}", {path.name: path}, path.name)
    return _hub_code(custom_pipeline, trust_remote_code=trust_remote_code)


def code_of_class(cls: type[Any]) -> FoundCode | None:
    """Finds the code of a pipeline's class; ``None`` for classes of diffusers and this package.

    Raises:
        InvalidModel: 400, its code is not in a Python file, or in several folders.
    """
    if cls.__module__.partition(".")[0] in ("diffusers", "bentoml_diffusers"):
        return None
    file = inspect.getsourcefile(cls) if cls.__module__ != "__main__" else None
    if file is None:
        raise InvalidModel(
            cls.__name__,
            "is not defined in a Python file, so its code cannot be stored",
            "put the class into a file and import it from there",
        )
    path = Path(file)
    if path.parent.name == CODE_FOLDER:  # loaded from the store: keep all files that belong to it
        files = {item.name: item for item in sorted(path.parent.glob("*.py"))}
        return FoundCode(f"file {path.name}", files, path.name, cls.__name__)
    beside = {item.name: item for item in sorted(path.parent.glob("*.py"))}
    files = with_imports(path.name, beside)
    return FoundCode(f"file {path.name}", files, path.name, cls.__name__)


def _declared_code(source: Source) -> FoundCode | None:
    if MODULAR_INDEX in source.written:
        has_config = (source.folder / BLOCKS_CONFIG).is_file()
        return _blocks_code(source.folder, source.name, source.index) if has_config else None
    declared = source.index["_class_name"]
    if not isinstance(declared, list):
        return None
    module, name = declared
    file = f"{module}.py"
    return FoundCode(f"{source.name}/{file}", {file: source.path(file)}, file, name)


def _blocks_code(
    folder: Path, origin: str, index: Mapping[str, Any] | None = None
) -> FoundCode | None:
    """Finds the code that ``modular_config.json`` names; ``None`` for blocks of diffusers."""
    declared = (read_json(folder / BLOCKS_CONFIG, origin).get("auto_map") or {}).get(_BLOCKS)
    module, _, name = str(declared).rpartition(".")
    if module == "__main__" or not (module.isidentifier() and name.isidentifier()):
        raise InvalidModel(
            origin,
            f"has an auto_map in {BLOCKS_CONFIG} that names no file and class: {declared!r}",
            "save blocks whose class is defined in a Python file",
        )
    files = {path.name: path.resolve() for path in sorted(folder.glob("*.py"))}
    if f"{module}.py" in files:
        needed = with_imports(f"{module}.py", files)
        return FoundCode(origin, needed, f"{module}.py", name, of_blocks=True)
    is_known = _names.resolve_blocks_class(name) is not None
    if is_known and index is not None and index.get("_blocks_class_name") == name:
        return None  # diffusers writes this also for blocks of its own
    raise InvalidModel(
        origin,
        f"lacks {module}.py, the code of its blocks",
        f"put the file with the class {name} beside {BLOCKS_CONFIG}: diffusers does not save it",
    )


def _folder_code(folder: Path) -> FoundCode:
    if (folder / BLOCKS_CONFIG).is_file():
        found = _blocks_code(folder, f"folder {folder.resolve().name}")
        if found is not None:
            return found
    if not (folder / ENTRY_FILE).is_file():
        raise InvalidOption("custom_pipeline", str(folder), f"a folder with {ENTRY_FILE}")
    files = {path.name: path for path in sorted(folder.glob("*.py"))}
    return FoundCode(f"folder {folder.resolve().name}", files, ENTRY_FILE)


def _code_names(names: Iterable[str]) -> list[str]:
    """Returns those files of a repository that are code, and the config that names the class."""
    return [name for name in names if "/" not in name and name.endswith((".py", BLOCKS_CONFIG))]


def _hub_code(name: str, *, trust_remote_code: bool) -> FoundCode:
    """Diffusers' community pipelines are a dataset on the hub, one folder per version."""
    from bentoml_diffusers.store.sources import download_file, download_snapshot

    if (
        name.count("/") > 1
        or not name.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise InvalidOption(
            "custom_pipeline", name, "a file, a folder, or the name of a hub repository"
        )
    if not trust_remote_code:
        raise UntrustedSource(
            "custom_pipeline", name, "code from the hub, only with trust_remote_code=True"
        )
    if "/" in name:
        root = download_snapshot(name, _code_names, revision="main").folder
        blocks = _blocks_code(root, name) if (root / BLOCKS_CONFIG).is_file() else None
        if blocks is not None:
            return blocks
        file = download_file(name, ENTRY_FILE)
        return FoundCode(name, {ENTRY_FILE: file}, ENTRY_FILE)
    for folder in (f"v{find_version('diffusers')}", "main"):
        try:
            file = download_file(_COMMUNITY, f"{folder}/{name}.py", repo_type="dataset")
        except InvalidModel:
            continue
        return FoundCode(f"{_COMMUNITY} {folder}", {ENTRY_FILE: file}, ENTRY_FILE)
    raise InvalidOption("custom_pipeline", name, "the name of a community pipeline of diffusers")
