"""Quiets other packages while a model is loaded."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from bentoml_diffusers import _compat

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences, for the block, what diffusers and transformers log at every load.

    That is progress bars without a terminal, and notes that torchvision is not installed.
    """
    has_terminal = bool(sys.stderr and sys.stderr.isatty())
    bars = contextlib.nullcontext() if has_terminal else _compat.no_progress_bars()
    with _compat.no_torchvision_notes(), bars:
        yield
