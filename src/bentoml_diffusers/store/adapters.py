"""LoRAs and textual inversions as entries of the model store."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel, ModelNotFound, UntrustedSource
from bentoml_diffusers.store.adapter_files import (
    AdapterFile,
    describe_embedding,
    describe_lora,
    read_adapter,
)
from bentoml_diffusers.store.entries import (
    ADAPTER_FOLDER,
    Kind,
    Record,
    hash_file,
    make_tag,
    with_hashes,
    write_entry,
)
from bentoml_diffusers.store.matches import find_same_details
from bentoml_diffusers.store.peft_folder import (
    PEFT_CONFIG,
    PEFT_TENSORS,
    find_peft_parts,
    join_peft_parts,
)
from bentoml_diffusers.store.sources import (
    PICKLE_SUFFIXES,
    check_name,
    convert_pickle,
    download_file,
    list_repository,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import bentoml
    from bentoml import Tag

_PREFERRED = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")


def import_lora(
    name: Tag | str,
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    base_model: str | None = None,
    components: Sequence[str] = (),
    revision: str = "main",
    allow_pickle: bool = False,
    labels: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> bentoml.Model:
    """Stores a LoRA under a name that requests can use.

    Args:
        name: Tag for the LoRA.
        source: A file in any layout that diffusers reads (diffusers, PEFT, kohya ...), a folder,
            or a hub repository. Also a folder that PEFT's ``save_pretrained`` wrote, or one with
            such a folder for each component.
        weight_name: File in the folder or repository; not needed if there is only one.
        base_model: What it was trained on, recorded as given.
        components: Denoisers that it is for, where a model has two and the file does not say it:
            ``["transformer_2"]`` of Wan 2.2. A request may override it.
        revision: Branch, tag or commit of the hub repository.
        allow_pickle: Read the tensors of a ``.bin`` or ``.pt`` file and store them as safetensors.
        labels: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, no LoRA in it, a broken file, or several of them.
        UntrustedSource: 400, a pickle without ``allow_pickle``.
        ModelNotFound: 404, no such file, folder or repository.
        TagConflict: 409, the version exists and holds something else.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    make_tag(name)  # before anything is fetched
    with _in_one_file(_find(source, weight_name, revision)) as found:
        adapter = _read(found, allow_pickle=allow_pickle)
        details = {**describe_lora(adapter), "base_model": base_model or adapter.base_model}
        details["loaded_into"] = list(components)
        return _store(name, found, "lora", details, labels, metadata)


def import_textual_inversion(
    name: Tag | str,
    source: str | os.PathLike[str],
    *,
    token: str | None = None,
    weight_name: str | None = None,
    base_model: str | None = None,
    revision: str = "main",
    allow_pickle: bool = False,
    labels: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> bentoml.Model:
    """Stores a textual inversion under a name.

    Args:
        name: Tag for the embedding.
        source: A file with one tensor per token or with ``emb_params``, a folder, or a hub
            repository.
        token: The placeholder token; by default the one that the file names.
        weight_name: File in the folder or repository; not needed if there is only one.
        base_model: What it was trained on, recorded as given.
        revision: Branch, tag or commit of the hub repository.
        allow_pickle: Read the tensors of a ``.bin`` or ``.pt`` file and store them as safetensors.
        labels: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, no embedding in it, a broken file, or several of them.
        UntrustedSource: 400, a pickle without ``allow_pickle``.
        ModelNotFound: 404, no such file, folder or repository.
        TagConflict: 409, the version exists and holds something else.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    make_tag(name)  # before anything is fetched
    found = _find(source, weight_name, revision)
    adapter = _read(found, allow_pickle=allow_pickle)
    details = {**describe_embedding(adapter, token), "base_model": base_model}
    return _store(name, found, "textual_inversion", details, labels, metadata)


@dataclass(frozen=True)
class _Found:
    """A file with an adapter: its path and its origin."""

    path: Path
    origin: str
    commit: str | None = None
    peft_parts: tuple[Path, ...] = ()

    @property
    def stored_name(self) -> str:
        return f"{self.path.stem}.safetensors"


def _find(source: str | os.PathLike[str], weight_name: str | None, revision: str) -> _Found:
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        is_peft = path.name == PEFT_TENSORS and (path.parent / PEFT_CONFIG).is_file()
        return _Found(path, f"file {path.name}", peft_parts=(path.parent,) if is_peft else ())
    if path.is_dir():
        parts = find_peft_parts(path) if weight_name in (None, PEFT_TENSORS) else []
        if parts:
            for part in parts:
                _check_within(path, part / PEFT_TENSORS)
            return _Found(path, f"folder {path.resolve().name}", peft_parts=tuple(parts))
        names = [item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()]
        chosen = path / _choose(names, weight_name, path.name)
        _check_within(path, chosen)
        return _Found(chosen, f"folder {path.resolve().name}")
    if path.is_absolute() or path.suffix or text.count("/") != 1 or text.startswith((".", "~")):
        raise ModelNotFound(
            path.name, "is neither a file, a folder nor a repository", "check the path"
        )
    if Path(text.partition("/")[0]).is_dir():
        raise ModelNotFound(path.name, "is not in that folder", "check the path")
    names = list(list_repository(text, revision)) or [weight_name or _PREFERRED[0]]
    file = download_file(text, _choose(names, weight_name, text), revision=revision)
    if file.name == PEFT_TENSORS and PEFT_CONFIG in names:
        config = download_file(text, PEFT_CONFIG, revision=revision)
        return _Found(file, text, _commit_of(file), peft_parts=(config.parent,))
    return _Found(file, text, _commit_of(file))


def _check_within(folder: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InvalidModel(folder.name, f"has a symlink that points outside of it: {file.name}")


def _commit_of(file: Path) -> str | None:
    """The commit from a path in the hub's cache, ``snapshots/<commit>/...``."""
    parts = file.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _choose(names: list[str], weight_name: str | None, source: str) -> str:
    if weight_name is not None:
        check_name(source, weight_name)
        if weight_name not in names:
            raise InvalidModel(source, f"has no file {weight_name!r}")
        return weight_name
    files = [name for name in names if name.endswith(".safetensors")]
    files = files or [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    preferred = [name for name in files if name in _PREFERRED]
    if len(preferred or files) != 1:
        listed = ", ".join(sorted(files)[:20]) or "none"
        raise InvalidModel(
            source, f"must have one file with weights, found: {listed}", "give weight_name="
        )
    return (preferred or files)[0]


@contextlib.contextmanager
def _in_one_file(found: _Found) -> Iterator[_Found]:
    """Joins the folders that PEFT wrote into one file; yields any other file unchanged."""
    if not found.peft_parts:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / _PREFERRED[0]
        join_peft_parts(list(found.peft_parts), file)
        yield replace(found, path=file)


def _read(found: _Found, *, allow_pickle: bool) -> AdapterFile:
    if found.path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise UntrustedSource(
            "source",
            found.path.name,
            "safetensors, as a pickle can run code when it is read; "
            "allow_pickle=True reads tensors out of it and stores them as safetensors",
        )
    return read_adapter(found.path)


def _store(
    name: Tag | str,
    found: _Found,
    kind: Kind,
    details: dict[str, Any],
    labels: dict[str, str] | None,
    metadata: dict[str, Any] | None,
) -> bentoml.Model:
    tag = make_tag(name)
    digest = hash_file(found.path)
    details = {key: value for key, value in details.items() if value not in (None, [], {})}
    details["sources"] = {found.path.name: digest}
    record = Record(kind=kind, origin=found.origin, commit=found.commit, details=details)

    def fill(entry: Path) -> Record:
        target = entry / ADAPTER_FOLDER / found.stored_name
        target.parent.mkdir()
        if found.path.suffix == ".safetensors":
            shutil.copyfile(found.path, target)
        else:
            convert_pickle(found.path, target, found.path.name)
        return with_hashes(record, target.parent, {}, set())

    def find_same(at: Tag) -> bentoml.Model | None:
        return find_same_details(at, record)

    return find_same(tag) or write_entry(
        tag,
        fill,
        find_same=find_same,
        labels={"kind": kind, **(labels or {})},
        metadata=metadata,
    )
