"""Corners of transformers."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def restore_text_model(view: Any, encoder: Any) -> None:
    """Lets a view of a text encoder have the ``text_model`` that it itself is by now.

    transformers 5 made one class of the two, and diffusers (0.42) asks the inner one for its final
    norm where ``clip_skip`` is given. Until it asks the encoder.
    """
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(view)["text_model"] = encoder


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Lets diffusers and transformers show no progress bars while they load, until the block ends.

    Not by their `disable_progress_bar`: that of transformers changes the hub's bars, too. Until
    their bars look for a terminal themselves (diffusers 0.42, transformers 5.20).
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    were_shown = [(module, module._tqdm_active) for module in (of_diffusers, of_transformers)]
    for module, _ in were_shown:
        module._tqdm_active = False
    try:
        yield
    finally:
        for module, was_shown in were_shown:
            module._tqdm_active = was_shown


@contextlib.contextmanager
def no_torchvision_notes() -> Iterator[None]:
    """Silences the notes of transformers that torchvision is not installed, until the block ends.

    Until the image processors that diffusers (0.42) imports need no note (transformers 5.20).
    """
    notes = logging.getLogger("transformers.utils.import_utils")
    notes.addFilter(_is_no_torchvision_note)
    try:
        yield
    finally:
        notes.removeFilter(_is_no_torchvision_note)


def _is_no_torchvision_note(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
