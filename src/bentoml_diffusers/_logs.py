"""What is logged while a model is loaded: less by other packages, more by this one."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from bentoml_diffusers import _compat

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences, until the block ends, what diffusers and transformers say whenever they load.

    Their progress bars where no terminal shows them, and notes that torchvision is not installed.
    """
    has_terminal = bool(sys.stderr and sys.stderr.isatty())
    bars = contextlib.nullcontext() if has_terminal else _compat.no_progress_bars()
    with _compat.no_torchvision_notes(), bars:
        yield
