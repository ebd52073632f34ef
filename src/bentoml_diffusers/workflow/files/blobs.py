"""Images, tensors and arrays beside the text of a workflow, each named by its sha256.

The text refers to one as ``{"$kind": "image", "blob": "<sha256>", ...}``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidWorkflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bentoml_diffusers.workflow.files.bounds import Bounds

KIND = "$kind"
FOLDER = "blobs"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXTENSIONS = {"image": "png", "tensor": "safetensors", "array": "safetensors"}


def name_of(data: bytes) -> str:
    """Returns the sha256 of a blob, which is its name."""
    return hashlib.sha256(data).hexdigest()


def find_blobs(values: Any, field: str = "workflow") -> Iterator[tuple[str, str, str]]:
    """Yields field, sha256 and file extension of each blob that ``values`` refers to."""
    if isinstance(values, list):
        for index, item in enumerate(values):
            yield from find_blobs(item, f"{field}[{index}]")
    if isinstance(values, dict):
        if isinstance(values.get("blob"), str) and KIND in values:
            yield field, values["blob"], _EXTENSIONS.get(str(values[KIND]), "bin")
            return
        for key, item in values.items():
            yield from find_blobs(item, f"{field}.{key}")


def collect(
    values: Mapping[str, Any], read: Callable[[str], bytes | None], bounds: Bounds
) -> dict[str, bytes]:
    """Reads the blobs that ``values`` refers to.

    Args:
        values: A workflow as JSON.
        read: Returns the blob of a file's name, ``None`` if there is none.
        bounds: Limits of their number and size.

    Raises:
        InvalidWorkflow: 400, one is missing or was changed, or they are too many or too large.
    """
    found: dict[str, bytes] = {}
    for field, sha256, extension in find_blobs(dict(values)):
        if sha256 in found:
            continue
        if not _SHA256.fullmatch(sha256):  # checked, since it becomes part of a path
            raise InvalidWorkflow(field, sha256, "a sha256: 64 digits of 0-9 and a-f")
        data = read(f"{sha256}.{extension}")
        if data is None:
            raise InvalidWorkflow(field, None, f"the blob {sha256}.{extension}, which is missing")
        if name_of(data) != sha256:
            raise InvalidWorkflow(
                field, name_of(data), f"a blob with the sha256 {sha256}; it was changed"
            )
        found[sha256] = data
        n_bytes = sum(len(one) for one in found.values())
        if len(found) > bounds.max_blobs or n_bytes > bounds.max_blob_bytes:
            raise InvalidWorkflow(
                field,
                f"{len(found)} blobs of {n_bytes} bytes in all",
                f"at most {bounds.max_blobs} of {bounds.max_blob_bytes} bytes",
            )
    return found


def encode_base64(data: bytes) -> str:
    """Returns a blob as base64, for a workflow in a single text."""
    return base64.b64encode(data).decode()


def decode_base64(field: str, text: object) -> bytes:
    """Reads base64.

    Raises:
        InvalidWorkflow: 400, not base64.
    """
    if not isinstance(text, str):
        raise InvalidWorkflow(field, text, "a base64 string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise InvalidWorkflow(field, text, "a base64 string") from err
