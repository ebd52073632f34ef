"""Pipelines into and out of BentoML's model store."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag

from bentoml_diffusers import _names
from bentoml_diffusers.errors import (
    InvalidModel,
    InvalidOption,
    ModelNotFound,
    TagConflict,
    suggest,
)
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store.hub import Download, download_pipeline
from bentoml_diffusers.store.layout import (
    MODULE_NAME,
    PIPELINE_FOLDER,
    PIPELINE_INDEX,
    UPSTREAM_MODULE_NAMES,
)
from bentoml_diffusers.store.record import Record, hash_files, read_record
from bentoml_diffusers.store.writing import make_tag, write_entry

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_NEVER_STORED = shutil.ignore_patterns(".git", ".cache", "__pycache__")


def get(tag_like: str | Tag) -> bentoml.Model:
    """Returns the stored model with the given tag.

    Args:
        tag_like: ``"name"``, ``"name:version"`` or a Tag; without version the latest.

    Raises:
        ModelNotFound: 404, no such model, or one of another framework.
    """
    try:
        model = bentoml.models.get(str(tag_like))  # a Tag would get a version written into it
    except bentoml.exceptions.NotFound as err:
        names = {entry.tag.name for entry in list_entries()}
        raise ModelNotFound(
            tag_like,
            f"is not in the model store{suggest(str(tag_like), names)}",
            "see `bentoml diffusers list`",
        ) from err
    if model.info.module not in (MODULE_NAME, *UPSTREAM_MODULE_NAMES):
        raise ModelNotFound(
            model.tag, f"was saved with module {model.info.module}, not with {MODULE_NAME}"
        )
    return model


def list_entries() -> list[bentoml.Model]:
    """Returns all models of the store that this package can read, adapters included."""
    modules = (MODULE_NAME, *UPSTREAM_MODULE_NAMES)
    return [model for model in bentoml.models.list() if model.info.module in modules]


def import_model(
    name: Tag | str,
    model_name_or_path: str | os.PathLike[str],
    *,
    proxies: Mapping[str, str] | None = None,
    revision: str = "main",
    variant: str | None = None,
    pipeline_class: str | type[DiffusionPipeline] | None = None,
    sync_with_hub_version: bool = False,
    signatures: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    external_modules: Sequence[ModuleType] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bentoml.Model:
    """Imports a pipeline from a folder or from the Hugging Face Hub into the model store.

    The same import again returns what is stored. Another import under the same name makes a new
    version, under the same name and version it is an error.

    Args:
        name: Tag for the model; without a version a new one is made.
        model_name_or_path: A folder that ``save_pretrained`` wrote, or a hub repository id.
        proxies: Proxies for the hub, by protocol.
        revision: Branch, tag or commit of the hub repository.
        variant: Which files to take, such as ``"fp16"``; it is stored, and used when loading.
        pipeline_class: Class to load with, stored with the model.
        sync_with_hub_version: Use the hub's commit (and variant) as the version.
        signatures: Methods of the runner; by default ``{"__call__": {"batchable": False}}``.
        labels: As in BentoML.
        custom_objects: As in BentoML.
        external_modules: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, the source holds no diffusers pipeline.
        ModelNotFound: 404, there is no such source.
        TagConflict: 409, the version exists and is something else.
    """
    tag = make_tag(name)
    options = ModelOptions(pipeline_class=pipeline_class, variant=variant)
    if pipeline_class is not None:
        _names.resolve_pipeline_class(pipeline_class)
    local = Path(model_name_or_path).expanduser()
    if local.is_dir():
        if sync_with_hub_version:
            raise InvalidOption("sync_with_hub_version", True, "false for a folder")
        check_pipeline_folder(local)
        found = Download(folder=local, commit="")
        origin = f"folder {local.resolve().name}"  # entries travel: no path of this machine
    else:
        _refuse_missing_path(local, str(model_name_or_path))
        origin = str(model_name_or_path)
        found = download_pipeline(origin, revision=revision, variant=variant, proxies=proxies)
        if sync_with_hub_version:
            tag = Tag(tag.name, "-".join(filter(None, (found.commit, variant))))
    record = Record(
        kind="pipeline",
        origin=origin,
        revision=None if local.is_dir() else revision,
        commit=found.commit or None,
        variant=variant,
        class_name=_class_name(found.folder),
        options=options.to_dict(),
    )
    stored = _find_same(tag, record, found.folder)
    if stored is not None:
        return stored

    def fill(folder: Path) -> Record:
        target = folder / PIPELINE_FOLDER
        shutil.copytree(found.folder, target, symlinks=False, ignore=_NEVER_STORED)
        return replace(record, files=hash_files(target))

    return write_entry(
        tag,
        record,
        fill,
        options=options,
        signatures=signatures,
        labels=labels,
        custom_objects=custom_objects,
        external_modules=external_modules,
        metadata=metadata,
    )


def save_model(
    name: Tag | str,
    pipeline: DiffusionPipeline,
    *,
    signatures: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    external_modules: Sequence[ModuleType] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bentoml.Model:
    """Saves a pipeline from memory to the model store.

    Args:
        name: Tag for the model; without a version a new one is made.
        pipeline: What to save; its weights are written as safetensors.
        signatures: Methods of the runner; by default ``{"__call__": {"batchable": False}}``.
        labels: As in BentoML.
        custom_objects: As in BentoML.
        external_modules: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, not a diffusers pipeline.
        TagConflict: 409, the version exists already.
    """
    import diffusers

    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise InvalidModel(type(pipeline).__name__, "is no diffusers.DiffusionPipeline")
    tag = make_tag(name)
    record = Record(kind="pipeline", origin="memory", class_name=type(pipeline).__name__)
    if tag.version and _stored(tag) is not None:
        raise TagConflict(tag, "a model", "a pipeline from memory")

    def fill(folder: Path) -> Record:
        target = folder / PIPELINE_FOLDER
        pipeline.save_pretrained(target, safe_serialization=True)
        return replace(record, files=hash_files(target))

    return write_entry(
        tag,
        record,
        fill,
        options=ModelOptions(),
        signatures=signatures,
        labels=labels,
        custom_objects=custom_objects,
        external_modules=external_modules,
        metadata=metadata,
    )


def check_pipeline_folder(folder: Path) -> None:
    """Checks that a folder holds a pipeline before anything is copied.

    Raises:
        InvalidModel: 400, no readable index, or a component that the index names is missing.
    """
    index = _read_index(folder)
    missing = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value[0] is not None and not (folder / name).is_dir()
    ]
    if missing:
        raise InvalidModel(
            folder.name,
            f"lacks the folders of {', '.join(missing)}, which its {PIPELINE_INDEX} names",
            "save the whole pipeline with save_pretrained",
        )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / PIPELINE_INDEX
    if not path.is_file():
        raise InvalidModel(
            folder.name,
            f"is no diffusers pipeline: it has no {PIPELINE_INDEX}",
            "give a folder that save_pretrained wrote",
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as err:
        raise InvalidModel(folder.name, f"has a broken {PIPELINE_INDEX}: {err}") from err
    if not isinstance(index, dict) or "_class_name" not in index:
        raise InvalidModel(folder.name, f"has a {PIPELINE_INDEX} that names no class")
    return index


def _class_name(folder: Path) -> str:
    name = _read_index(folder)["_class_name"]
    return name[-1] if isinstance(name, list) else str(name)


def _refuse_missing_path(path: Path, text: str) -> None:
    """An absolute or dotted path is no repository id, whatever the hub would say of it."""
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelNotFound(text, "is not a folder here", "check the path")


def _stored(tag: Tag) -> bentoml.Model | None:
    try:
        return bentoml.models.get(str(tag))  # a Tag would get the latest version written into it
    except bentoml.exceptions.NotFound:
        return None


def _find_same(tag: Tag, asked: Record, folder: Path) -> bentoml.Model | None:
    """Returns the stored model if it is the same thing; refuses another under a full tag."""
    model = _stored(tag)
    if model is None:
        return None
    record = read_record(Path(model.path))
    if record is not None and _is_same(record, asked, folder):
        logger.info("%s already holds %s", model.tag, record.source)
        return model
    if tag.version:
        raise TagConflict(tag, record.source if record else "another model", asked.source)
    return None


def _is_same(stored: Record, asked: Record, folder: Path) -> bool:
    identity = ("kind", "origin", "commit", "variant", "options")
    if any(getattr(stored, name) != getattr(asked, name) for name in identity):
        return False
    return asked.commit is not None or stored.files == {
        name: digest
        for name, digest in hash_files(folder).items()
        if not name.startswith((".git/", ".cache/"))
    }
