"""Imports pipelines: from a folder, a single file, or the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bentoml import Tag

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel, InvalidOption, ModelNotFound
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store.code import FoundCode, brings_blocks, find_code, is_trusted, trust_code
from bentoml_diffusers.store.entries import (
    BLOCKS_CONFIG,
    MODULAR_INDEX,
    PIPELINE_INDEX,
    Linker,
    LinkMode,
    Record,
    hash_file,
    make_tag,
    write_entry,
)
from bentoml_diffusers.store.filling import fill_from_folder
from bentoml_diffusers.store.matches import find_same_details, find_same_model
from bentoml_diffusers.store.modular import (
    ModularDownload,
    complete_workflows,
    download_modular,
    open_as_modular,
    open_modular,
    read_blocks,
)
from bentoml_diffusers.store.single_file import Checkpoint, fill_from_checkpoint, open_checkpoint
from bentoml_diffusers.store.sources import (
    Download,
    Place,
    Source,
    Wanted,
    WeightChoice,
    class_name,
    download_pipeline,
    find_index,
    open_folder,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    import bentoml
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_NEVER_STORED = (
    "pipeline_class",
    "variant",
    "custom_pipeline",
    "trust_remote_code",
    "load_pretrained_extra_kwargs",
)
LINK_MODES: tuple[str, ...] = get_args(LinkMode)


def import_model(
    name: Tag | str,
    model_name_or_path: str | os.PathLike[str],
    *,
    proxies: Mapping[str, str] | None = None,
    revision: str = "main",
    variant: str | None = None,
    pipeline_class: str | type[DiffusionPipeline] | None = None,
    sync_with_hub_version: bool = False,
    custom_pipeline: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    config: str | os.PathLike[str] | None = None,
    link: LinkMode = "auto",
    options: Mapping[str, Any] | None = None,
    signatures: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    external_modules: Sequence[ModuleType] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bentoml.Model:
    """Imports a pipeline from a folder, a single file or the Hugging Face Hub.

    Repeating an import returns the stored model. A different import under the same name makes a
    new version; under the same name and version it is an error. An import that is killed leaves
    either the complete model in the store or nothing.

    Args:
        name: Tag for the model; without a version a new one is made.
        model_name_or_path: A folder that ``save_pretrained`` wrote, a ``.safetensors`` checkpoint
            of a whole Stable Diffusion, or a hub repository id.
        proxies: Proxies for the hub, by protocol.
        revision: Branch, tag or commit of the hub repository.
        variant: Which files to take, such as ``"fp16"``; it is stored, and used when loading.
        pipeline_class: Class to load with, stored with the model. ``"ModularPipeline"`` stores a
            classic pipeline as the modular one of its family.
        sync_with_hub_version: Use the hub's commit (and variant) as the version.
        custom_pipeline: Pipeline code to store with the model: a file, a folder with
            ``pipeline.py``, or the name of a community pipeline or of a hub repository; or blocks:
            a folder with ``modular_config.json``. It runs only when trusted.
        trust_remote_code: Take code from the hub, and trust the code that comes with the model
            in this store; other stores ask again.
        allow_pickle: Read the tensors of ``.bin`` and ``.ckpt`` files where there are no
            safetensors, and store them as safetensors.
        config: For a single file: the folder, or the tag of a stored model, whose configs and
            tokenizers it takes.
        link: How files of a folder are put into the store: ``"auto"`` links what cannot be edited
            in place and copies the rest, ``"copy"`` copies all, ``"hard"`` links all.
        options: More options to store with the model, see :class:`ModelOptions`.
        signatures: Methods of the runner; by default ``{"__call__": {"batchable": False}}``.
        labels: As in BentoML.
        custom_objects: As in BentoML.
        external_modules: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, the source holds no diffusers pipeline, or a broken one.
        UntrustedSource: 400, pickled weights or code that are not allowed.
        ModelNotFound: 404, there is no such source.
        TagConflict: 409, the version exists and is something else.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
        StorageFull: 507, no space left.
    """
    if link not in LINK_MODES:
        raise InvalidOption("link", link, f"one of {', '.join(LINK_MODES)}")
    goal = _Goal(
        tag=make_tag(name),
        options=_options_to_store(options, pipeline_class, variant, custom_pipeline),
        trust=trust_remote_code,
        arguments={
            "signatures": signatures,
            "labels": labels,
            "custom_objects": custom_objects,
            "external_modules": external_modules,
            "metadata": metadata,
        },
    )
    path = Path(model_name_or_path).expanduser()
    if path.is_file():
        return _import_file(goal, open_checkpoint(path, config, allow_pickle=allow_pickle))
    if config is not None:
        raise InvalidOption("config", str(config), "None: it is for single files only")
    wanted = Wanted(
        source=str(model_name_or_path),
        weights=WeightChoice(variant, allow_pickle),
        revision=revision,
        proxies=proxies,
        custom_pipeline=custom_pipeline,
        modular=_names.is_modular_class(pipeline_class) or brings_blocks(custom_pipeline),
    )
    if path.is_dir():
        if sync_with_hub_version:
            raise InvalidOption("sync_with_hub_version", True, "false for a folder")
        return _import_local(goal, path, wanted, link)
    return _import_hub(goal, wanted, link, sync=sync_with_hub_version)


def _options_to_store(
    options: Mapping[str, Any] | None,
    pipeline_class: str | type[DiffusionPipeline] | None,
    variant: str | None,
    custom_pipeline: str | None,
) -> ModelOptions:
    if pipeline_class is not None:
        _names.resolve_pipeline_class(pipeline_class)
    for name in _NEVER_STORED:
        if name in (options or {}):
            raise InvalidOption(name, (options or {})[name], "an argument of import_model")
    stored = ModelOptions.from_mapping(dict(options or {}))
    bundled = custom_pipeline if custom_pipeline in _names.BUNDLED_PIPELINES else None
    return stored.overridden_by(
        ModelOptions(pipeline_class=pipeline_class, variant=variant, custom_pipeline=bundled)
    )


@dataclass(frozen=True)
class _Goal:
    """The tag of an import, and what is stored beside the files."""

    tag: Tag
    options: ModelOptions
    trust: bool
    arguments: Mapping[str, Any]


def _import_local(goal: _Goal, folder: Path, wanted: Wanted, link: LinkMode) -> bentoml.Model:
    name = folder.resolve().name  # entries are exported to other machines: no path of this one
    source = _open(folder, name, wanted)
    record = Record(kind="pipeline", origin=f"folder {name}", variant=wanted.weights.variant)
    return _import_source(goal, record, source, wanted, link)


def _import_hub(goal: _Goal, wanted: Wanted, link: LinkMode, *, sync: bool) -> bentoml.Model:
    _refuse_missing_path(wanted.source, goal.tag)
    found = _download(wanted)
    if sync:
        version = "-".join(filter(None, (found.commit, wanted.weights.variant)))
        goal = replace(goal, tag=Tag(goal.tag.name, version))
    parts = found.parts if isinstance(found, ModularDownload) else {}
    places = found.places if isinstance(found, ModularDownload) else {}
    source = _open(found.folder, wanted.source, wanted, places)
    record = Record(
        kind="pipeline",
        origin=wanted.source,
        revision=wanted.revision,
        commit=found.commit,
        variant=wanted.weights.variant,
        details={"parts": dict(parts)} if parts else {},
    )
    return _import_source(goal, record, source, wanted, link)


def _download(wanted: Wanted) -> Download:
    index = find_index(wanted)
    download = download_modular if index.name == MODULAR_INDEX else download_pipeline
    return download(wanted, index)


def _open(
    folder: Path, name: str, wanted: Wanted, elsewhere: Mapping[str, Place] | None = None
) -> Source:
    """Opens a folder as it is, or a classic pipeline as a modular one if that is wanted."""
    is_classic = (folder / PIPELINE_INDEX).is_file()
    if (folder / MODULAR_INDEX).is_file() and (wanted.modular or not is_classic):
        return open_modular(folder, name=name, weights=wanted.weights, elsewhere=elsewhere)
    if not is_classic and (folder / BLOCKS_CONFIG).is_file():
        raise InvalidModel(
            name,
            f"holds blocks, but not a pipeline: it has no {MODULAR_INDEX}",
            "import the pipeline that they belong to, with this folder as custom_pipeline",
        )
    source = open_folder(folder, name=name, weights=wanted.weights)
    if not wanted.modular:
        return source
    return open_as_modular(source, has_own_blocks=wanted.custom_pipeline is not None)


def _import_source(
    goal: _Goal, record: Record, source: Source, wanted: Wanted, link: LinkMode
) -> bentoml.Model:
    code = find_code(wanted.custom_pipeline, source, trust_remote_code=goal.trust)
    given = goal.options.pipeline_class
    if MODULAR_INDEX in source.written and given and not _names.is_modular_class(given):
        raise InvalidOption("pipeline_class", given, "a modular class: the source is modular")
    if code is not None and code.of_blocks and MODULAR_INDEX not in source.written:
        raise InvalidOption(
            "custom_pipeline",
            wanted.custom_pipeline,
            "a pipeline; for blocks give pipeline_class='ModularPipeline' too",
        )
    record = replace(
        record,
        class_name=class_name(source.index),
        options=goal.options.to_dict(),
        details={**record.details, **_describe_modular(source, code)},
    )
    linker = Linker(link)

    def find_same(tag: Tag) -> bentoml.Model | None:
        return find_same_model(tag, record, source, code, goal.arguments["signatures"])

    try:
        model = find_same(goal.tag) or write_entry(
            goal.tag,
            lambda entry: fill_from_folder(entry, record, source, code, linker),
            options=goal.options,
            find_same=find_same,
            **goal.arguments,
        )
    except BaseException:
        linker.undo()
        raise
    linker.log(model.tag)
    if code is not None:
        _settle_trust(model.tag, code.sha256, trust=goal.trust)
    return model


def _settle_trust(tag: Tag, sha256: str, *, trust: bool) -> None:
    if trust:
        trust_code(sha256)
    elif not is_trusted(sha256):
        logger.warning(
            "%s brings code that is not trusted (%s): review it in its folder code/, then import "
            "it again with trust_remote_code=True",
            tag,
            sha256,
        )


def _describe_modular(source: Source, code: FoundCode | None) -> dict[str, Any]:
    """Describes the blocks of a modular pipeline and its complete workflows; refuses one with none.

    Blocks of the model's own are code, which does not run here: they are checked at the load.
    """
    if MODULAR_INDEX not in source.written:
        return {}
    if not _names.is_modular_class(class_name(source.index)):
        raise InvalidModel(
            source.name, f"names {class_name(source.index)}, no modular pipeline of diffusers"
        )
    if code is not None:
        return {"blocks": code.class_name}
    blocks = read_blocks(source.folder, source.index, source.name)
    workflows = complete_workflows(blocks, source.places, source.name)
    return {"blocks": type(blocks).__name__, "modular_workflows": workflows}


def _import_file(goal: _Goal, checkpoint: Checkpoint) -> bentoml.Model:
    record = Record(
        kind="pipeline",
        origin=f"file {checkpoint.path.name}",
        options=goal.options.to_dict(),
        details={"sources": {checkpoint.path.name: hash_file(checkpoint.path)}},
    )

    def find_same(tag: Tag) -> bentoml.Model | None:
        return find_same_details(tag, record)

    return find_same(goal.tag) or write_entry(
        goal.tag,
        lambda entry: fill_from_checkpoint(entry, record, checkpoint, goal.options.pipeline_class),
        options=goal.options,
        find_same=find_same,
        **goal.arguments,
    )


def _refuse_missing_path(text: str, tag: Tag) -> None:
    """Refuses what is clearly a missing path before the hub is asked."""
    first, _, rest = text.partition("/")
    if Path(text).expanduser().is_absolute() or text.startswith((".", "~")) or "/" in rest:
        raise ModelNotFound(text, "is not a folder or file here", "check the path")
    if rest and Path(first).is_dir():
        raise ModelNotFound(
            text,
            f"is not a folder or file here, but {first!r} is a folder",
            "check the path; for a hub repository of that name, run from another folder",
        )
    if not rest and Path(tag.name).exists():
        raise ModelNotFound(
            text,
            f"is not a folder or file here, but {tag.name!r} is",
            "the tag comes first, then the source",
        )
