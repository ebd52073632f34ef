"""Gets one entry of the model store by its tag, or lists all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidModel, ModelNotFound, suggest
from bentoml_diffusers.store.entries.layout import MODULE_NAME, UPSTREAM_MODULE_NAMES
from bentoml_diffusers.store.entries.record import Record, read_record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bentoml import Tag

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
    """Returns the model with exactly this tag (without version the latest), or ``None``."""
    if tag.version and not (_compat.model_store().root / tag.path()).is_dir():
        return None  # BentoML also takes prefixes: it would find `name:v10` for `name:v1`
    try:
        return bentoml.models.get(str(tag))
    except bentoml.exceptions.NotFound:
        return None


def list_entries() -> list[bentoml.Model]:
    """Returns all models of the store that this package can read, adapters included."""
    modules = (MODULE_NAME, *UPSTREAM_MODULE_NAMES)
    return [model for model in bentoml.models.list() if model.info.module in modules]


def list_records() -> Iterator[tuple[bentoml.Model, Record | None]]:
    """Yields each of them with its record; skips an unreadable one with a warning."""
    for model in list_entries():
        try:
            record = read_record(Path(model.path))
        except InvalidModel as err:  # noqa: PERF203 - one broken entry must not hide the others
            logger.warning("skipped: %s", err)
        else:
            yield model, record
