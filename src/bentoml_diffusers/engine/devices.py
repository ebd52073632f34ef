"""The default device of an engine."""

from __future__ import annotations


def default_device() -> str:
    """Returns ``"cuda"``, ``"mps"`` or ``"cpu"``: the best that is available."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
