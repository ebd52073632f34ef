"""Errors of diffusers and PEFT in words for whoever sent the file."""

from __future__ import annotations

_LENGTH = 600


def explain(error: BaseException, path: str = "", name: str = "") -> str:
    """Returns the whole reason in one line.

    Args:
        error: What another package raised.
        path: Path on this machine, which a client must not read.
        name: What stands for it.
    """
    text = " ".join(str(error).split())
    text = text.replace(path, name) if path else text
    text = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
    if isinstance(error, KeyError):
        return f"what belongs to its other tensors is missing: {text}"
    if isinstance(error, (IndexError, AttributeError, TypeError)) or not text:
        # What they say is of Python, not of the file.
        return "its keys are in no layout that diffusers reads for this pipeline"
    return text
