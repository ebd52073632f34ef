"""Which code may be executed from this store: hashes that an operator trusted here.

Trust does not travel: a model that was exported elsewhere brings its code, not its permission.
"""

from __future__ import annotations

from bentoml_diffusers import _compat

_FILE = "diffusers_trusted_code"


def trust_code(sha256: str) -> None:
    """Records that code with this hash may be executed from this store."""
    if not is_trusted(sha256):
        with (_compat.model_store().root.parent / _FILE).open("a") as stream:
            stream.write(f"{sha256}\n")


def is_trusted(sha256: str) -> bool:
    """True if :func:`trust_code` was called for this hash, in this or an earlier process."""
    path = _compat.model_store().root.parent / _FILE
    return path.is_file() and sha256 in path.read_text().split()
