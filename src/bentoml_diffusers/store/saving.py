"""Pipelines from memory into BentoML's model store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel, TagConflict
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store.code import code_of_class, trust_code
from bentoml_diffusers.store.entries import (
    PIPELINE_FOLDER,
    Record,
    find_stored,
    make_tag,
    write_entry,
)
from bentoml_diffusers.store.filling import fill_from_pipeline, finish_record
from bentoml_diffusers.store.modular import prepare_modular, refuse_loras, write_modular

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    import bentoml
    from bentoml import Tag
    from diffusers import DiffusionPipeline, ModularPipeline


def save_model(
    name: Tag | str,
    pipeline: DiffusionPipeline | ModularPipeline,
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
        pipeline: The pipeline, classic or modular; its weights are written as safetensors. The
            code of a class, or of blocks, that is not of diffusers is saved too, and needs
            ``trust_remote_code=True`` to load elsewhere. Loaded IP-Adapters and the guider
            of a modular pipeline come along.
        signatures: Methods of the runner; by default ``{"__call__": {"batchable": False}}``.
        labels: As in BentoML.
        custom_objects: As in BentoML.
        external_modules: As in BentoML.
        metadata: As in BentoML.

    Raises:
        InvalidModel: 400, not a diffusers pipeline, one whose code is in no file, or one that
            could not be restored: with LoRAs loaded, or with a component missing.
        TagConflict: 409, the version exists already.
    """
    import diffusers

    is_modular = isinstance(pipeline, diffusers.ModularPipeline)
    if not is_modular and not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise InvalidModel(type(pipeline).__name__, "is not a diffusers.DiffusionPipeline")
    tag = make_tag(name)
    if find_stored(tag) is not None and tag.version:
        raise TagConflict(tag, "a model", "a pipeline from memory")
    record = Record(kind="pipeline", origin="memory", class_name=type(pipeline).__name__)
    refuse_loras(pipeline)
    if is_modular:
        prepared = prepare_modular(pipeline)
        code, record = prepared.code, replace(record, details=prepared.details)
    else:
        code = code_of_class(type(pipeline))
    if code is not None:
        trust_code(code.sha256)

    def fill(folder: Path) -> Record:
        if not is_modular:
            return fill_from_pipeline(folder, record, pipeline, code)
        write_modular(prepared, pipeline, folder / PIPELINE_FOLDER)
        return finish_record(folder, record, code)

    return write_entry(
        tag,
        fill,
        options=ModelOptions(),
        signatures=signatures,
        labels=labels,
        custom_objects=custom_objects,
        external_modules=external_modules,
        metadata=metadata,
    )
