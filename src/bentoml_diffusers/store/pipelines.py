"""Pipelines into and out of BentoML's model store."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidModel, ModelNotFound, TagConflict, suggest
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store.code import code_of_class
from bentoml_diffusers.store.filling import fill_from_pipeline, finish_record
from bentoml_diffusers.store.layout import MODULE_NAME, PIPELINE_FOLDER, UPSTREAM_MODULE_NAMES
from bentoml_diffusers.store.modular_saving import prepare_modular, refuse_loras, write_modular
from bentoml_diffusers.store.record import Record, read_record
from bentoml_diffusers.store.trust import trust_code
from bentoml_diffusers.store.writing import make_tag, write_entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

    from diffusers import DiffusionPipeline, ModularPipeline

logger = logging.getLogger(__name__)

_compat.parse_models_by_libyaml()


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


def find_stored(tag: Tag) -> bentoml.Model | None:
    """Returns the model with just this tag, the latest if it has no version, or ``None``."""
    if tag.version and not (_compat.model_store().root / tag.path()).is_dir():
        return None  # BentoML would find `name:v10` for `name:v1`
    try:
        return bentoml.models.get(str(tag))
    except bentoml.exceptions.NotFound:
        return None


def list_entries() -> list[bentoml.Model]:
    """Returns all models of the store that this package can read, adapters included."""
    modules = (MODULE_NAME, *UPSTREAM_MODULE_NAMES)
    return [model for model in bentoml.models.list() if model.info.module in modules]


def list_records() -> Iterator[tuple[bentoml.Model, Record | None]]:
    """Yields each of these with its record; one that cannot be read is left out, with a warning."""
    for model in list_entries():
        try:
            record = read_record(Path(model.path))
        except InvalidModel as err:  # noqa: PERF203 - one must not hide the others
            logger.warning("left out: %s", err)
        else:
            yield model, record


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
        pipeline: What to save, classic or modular; its weights are written as safetensors. The
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
            would not come back as it is: with LoRAs loaded, or with a component missing.
        TagConflict: 409, the version exists already.
    """
    import diffusers

    is_modular = isinstance(pipeline, diffusers.ModularPipeline)
    if not is_modular and not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise InvalidModel(type(pipeline).__name__, "is no diffusers.DiffusionPipeline")
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
