"""Errors of diffusers and PEFT, made readable for whoever sent the file."""

from __future__ import annotations

_LENGTH = 600


def explain(error: BaseException, path: str = "", name: str = "") -> str:
    """Returns the complete reason on one line.

    Args:
        error: The error that another package raised.
        path: Path on this machine, which a client must not read.
        name: Text to put in its place.
    """
    text = " ".join(str(error).split())
    text = text.replace(path, name) if path else text
    text = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
    if isinstance(error, KeyError):
        return f"tensors that belong to the others are missing: {text}"
    if isinstance(error, (IndexError, AttributeError, TypeError)) or not text:
        # Their texts are about Python, not about the file.
        return "its keys match no layout that diffusers reads for this pipeline"
    return text
