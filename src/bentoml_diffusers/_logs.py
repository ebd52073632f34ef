"""What is logged while a model is loaded: less by other packages, more by this one.

Beside ``_compat`` the only place that looks into private corners of other packages.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences, until the block ends, what diffusers and transformers say whenever they load.

    Their progress bars where no terminal shows them, and notes that torchvision is not installed.
    Until their bars look for a terminal themselves (diffusers 0.42, transformers 5.20), and the
    image processors that diffusers imports need no note.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    # Not their `disable_progress_bar`: that of transformers changes the hub's bars, too.
    were_shown = [(module, module._tqdm_active) for module in (of_diffusers, of_transformers)]
    notes = logging.getLogger("transformers.utils.import_utils")
    notes.addFilter(_is_no_torchvision_note)
    try:
        if not (sys.stderr and sys.stderr.isatty()):
            for module, _ in were_shown:
                module._tqdm_active = False
        yield
    finally:
        notes.removeFilter(_is_no_torchvision_note)
        for module, was_shown in were_shown:
            module._tqdm_active = was_shown


def _is_no_torchvision_note(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


def log_as_bentoml(name: str) -> None:
    """Lets a logger say as much as BentoML's own, in a process that ``bentoml serve`` started.

    Everyone else's says only warnings there. Until a service can ask for it (BentoML 1.4).
    """
    from bentoml._internal.context import server_context

    mine = logging.getLogger(name)
    if server_context.service_type is not None and mine.level == logging.NOTSET:
        mine.setLevel(logging.getLogger("bentoml").level)
