"""What the log of a server says while its workers start: a line for each stage."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

from bentoml_diffusers import _compat, _logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bentoml import Tag

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def say_loading(tag: Tag) -> Iterator[None]:
    """Says that a model is being loaded, and when it is, in place of the libraries' own bars."""
    _compat.log_as_bentoml("bentoml_diffusers")
    began = time.perf_counter()
    logger.info("%s: loading", tag)
    with _logs.quiet_loading():
        yield
    logger.info("%s: loaded in %.1f s", tag, time.perf_counter() - began)
