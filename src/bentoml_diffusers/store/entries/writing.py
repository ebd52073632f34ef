"""Writes entries of the model store atomically: complete, or not at all.

BentoML fills a temporary folder and then copies it file by file into the store, so a killed
import leaves half a model under a valid tag. Here the entry is filled beside the store, on the
same file system, and moved into its place by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attr
import bentoml
from bentoml import Tag
from bentoml.models import ModelContext
from filelock import FileLock, Timeout

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import DiffusersError, InvalidModel, StoreNotWritable, TagConflict
from bentoml_diffusers.store.entries.hashing import hash_rest_later
from bentoml_diffusers.store.entries.layout import API_VERSION, MODULE_NAME
from bentoml_diffusers.store.entries.linking import storage_errors
from bentoml_diffusers.store.entries.record import Record, package_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bentoml_diffusers.options import ModelOptions

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
DEFAULT_SIGNATURES: Mapping[str, Mapping[str, Any]] = {"__call__": {"batchable": False}}
MODEL_ARGUMENTS = ("signatures", "labels", "metadata", "custom_objects", "external_modules")


def make_tag(name: str | Tag) -> Tag:
    """Returns the tag; without a version it has none yet.

    Raises:
        InvalidModel: 400, not a tag.
    """
    try:
        return Tag.from_taglike(name)
    except (ValueError, bentoml.exceptions.BentoMLException) as err:
        next_step = "the tag comes first, then the source" if "/" in str(name) else ""
        raise InvalidModel(name, f"is not a tag of the model store: {err}", next_step) from err


def write_entry(
    tag: Tag,
    fill: Callable[[Path], Record],
    *,
    options: ModelOptions | None = None,
    find_same: Callable[[Tag], bentoml.Model | None] | None = None,
    **arguments: Any,
) -> bentoml.Model:
    """Fills a new entry and puts it into the model store.

    Args:
        tag: Where to; without a version a new one is made.
        fill: Writes the files into the folder that it gets, and returns the record.
        options: Stored with the model.
        find_same: Called again when the entry is ready: returns the model that another
            process has stored meanwhile, if it is the same.
        **arguments: ``signatures``, ``labels``, ``metadata``, ``custom_objects`` and
            ``external_modules``, as in BentoML.

    Raises:
        TagConflict: 409, the tag was taken while the entry was filled.
        StorageFull: 507, no space left.
        StoreNotWritable: 507, the store is read-only.
    """
    store = _compat.model_store()
    with _write_errors(store.root), _staging_folder(store.root) as folder:
        draft = _make_draft(tag, options, arguments)
        with storage_errors(tag):
            record = fill(folder)
            record.write(folder)
            _flush(attr.evolve(draft, path=folder), list(arguments.get("external_modules") or ()))
        with FileLock(_staging_root(store.root) / f"{tag.name}.lock"):
            same = find_same(tag) if find_same is not None else None
            if same is not None:
                return same
            _publish(folder, draft.tag, store, record)
    model = bentoml.models.get(str(draft.tag))
    hash_rest_later(Path(model.path), record)
    return model


@contextlib.contextmanager
def _write_errors(store_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if isinstance(err, DiffusersError) or err.errno not in _READ_ONLY:
            raise
        if not Path(str(err.filename)).is_relative_to(store_root.parent):
            raise  # a file of the source that may not be read
        raise StoreNotWritable(store_root, str(err.strerror)) from err


def _make_draft(
    tag: Tag, options: ModelOptions | None, arguments: Mapping[str, Any]
) -> bentoml.Model:
    return bentoml.Model.create(
        tag if tag.version else tag.make_new_version(),
        module=MODULE_NAME,
        api_version=API_VERSION,
        signatures=dict(arguments.get("signatures") or DEFAULT_SIGNATURES),
        labels=dict(arguments.get("labels") or {}),
        options=options,
        custom_objects=dict(arguments.get("custom_objects") or {}),
        metadata=dict(arguments.get("metadata") or {}),
        context=ModelContext(framework_name="diffusers", framework_versions=package_versions()),
    )


def _staging_root(store_root: Path) -> Path:
    folder = store_root.parent / "diffusers_staging"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _staging_folder(store_root: Path) -> Iterator[Path]:
    root = _staging_root(store_root)
    with contextlib.ExitStack() as stack:
        # A folder is made and locked in one step, as others see it: no lock means no owner.
        with FileLock(root / "staging.lock"):
            _remove_abandoned(root)
            parent = Path(tempfile.mkdtemp(dir=root))
            stack.callback(shutil.rmtree, parent, ignore_errors=True)
            stack.enter_context(FileLock(parent / "lock"))
        folder = parent / "entry"
        folder.mkdir()
        yield folder


def _remove_abandoned(root: Path) -> None:
    """Removes folders that killed imports left behind."""
    for folder in root.iterdir():
        if folder.is_dir() and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """True if the lock is free: the system releases it when its holder is killed."""
    try:
        with FileLock(folder / "lock", timeout=0):
            return True
    except (Timeout, OSError):
        return False


def _flush(model: bentoml.Model, external_modules: list[Any]) -> None:
    registered: list[Any] = []
    try:
        bentoml.Model.enter_cloudpickle_context(external_modules, registered)
        model.flush()
    finally:
        bentoml.Model.exit_cloudpickle_context(registered)


def _publish(folder: Path, tag: Tag, store: _compat.StoreAccess, record: Record) -> None:
    target = store.root / tag.path()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The only moment at which readers see a change: the whole entry appears at once.
        folder.rename(target)  # fails if the target is a folder with files
    except OSError as err:
        if target.exists():
            raise TagConflict(tag, "another model", record.source) from err
        raise
    # Last: `latest` must never name a version that is not there.
    store.set_latest(tag)
