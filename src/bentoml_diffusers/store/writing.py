"""Writes entries of the model store: whole or not at all.

BentoML fills a temporary folder and then copies it file by file into the store, so a killed
import leaves half a model under a valid tag. Here the entry is filled beside the store, on the
same file system, and moved into its place by one rename.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attr
import bentoml
from bentoml import Tag
from bentoml.models import ModelContext

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidModel, TagConflict
from bentoml_diffusers.store.layout import API_VERSION, MODULE_NAME
from bentoml_diffusers.store.record import package_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from bentoml_diffusers.options import ModelOptions
    from bentoml_diffusers.store.record import Record

DEFAULT_SIGNATURES: Mapping[str, Mapping[str, Any]] = {"__call__": {"batchable": False}}


def make_tag(name: str | Tag) -> Tag:
    """Returns the tag; without a version it has none yet.

    Raises:
        InvalidModel: 400, not a tag.
    """
    try:
        return Tag.from_taglike(name)
    except (ValueError, bentoml.exceptions.BentoMLException) as err:
        raise InvalidModel(name, f"is no tag of the model store: {err}") from err


def write_entry(
    tag: Tag,
    record: Record,
    fill: Callable[[Path], Record],
    *,
    options: ModelOptions | None = None,
    signatures: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    external_modules: Sequence[ModuleType] | None = None,
) -> bentoml.Model:
    """Fills a new entry and puts it into the model store.

    Args:
        tag: Where to; without a version a new one is made.
        record: What is known before the files are there.
        fill: Writes the files into the folder that it gets, and returns the whole record.
        options: Stored with the model.
        signatures: Methods of the runner; by default ``__call__``.
        labels: As in BentoML.
        metadata: As in BentoML.
        custom_objects: As in BentoML.
        external_modules: As in BentoML.

    Raises:
        TagConflict: 409, the tag was taken while the entry was filled.
    """
    store = _compat.model_store()
    draft = bentoml.Model.create(
        tag if tag.version else tag.make_new_version(),
        module=MODULE_NAME,
        api_version=API_VERSION,
        signatures=dict(signatures or DEFAULT_SIGNATURES),
        labels=dict(labels or {}),
        options=options,
        custom_objects=dict(custom_objects or {}),
        metadata=dict(metadata or {}),
        context=ModelContext(framework_name="diffusers", framework_versions=package_versions()),
    )
    with _staging_folder(store.root) as folder:
        model = attr.evolve(draft, path=folder)
        record = fill(folder)
        record.write(folder)
        _flush(model, list(external_modules or []))
        _publish(folder, model.tag, store, record)
    return bentoml.models.get(model.tag)


@contextlib.contextmanager
def _staging_folder(store_root: Path) -> Any:
    parent = store_root.parent / "diffusers_staging"
    parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(model: bentoml.Model, external_modules: list[ModuleType]) -> None:
    registered: list[ModuleType] = []
    try:
        bentoml.Model.enter_cloudpickle_context(external_modules, registered)
        model.flush()
    finally:
        bentoml.Model.exit_cloudpickle_context(registered)


def _publish(folder: Path, tag: Tag, store: _compat.StoreAccess, record: Record) -> None:
    target = store.root / tag.path()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)  # fails if the target is a folder with files
    except OSError as err:
        if target.exists():
            raise TagConflict(tag, "another model", record.source) from err
        raise
    store.set_latest(tag)
