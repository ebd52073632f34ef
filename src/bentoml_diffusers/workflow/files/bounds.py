"""Size limits of workflows, which may be untrusted, and JSON parsing within them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidWorkflow

if TYPE_CHECKING:
    from bentoml_diffusers.options import RequestLimits


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a workflow may contain at most.

    Attributes:
        max_json_bytes: Size of the text, without blobs.
        max_depth: Nesting of lists and objects.
        max_values: Total number of numbers, strings, lists and objects.
        max_blobs: Number of images, tensors and arrays.
        max_blob_bytes: Their total size, as stored.
        max_side: Largest side of an image, in pixels.
        max_pixels: Pixels of one image.
    """

    max_json_bytes: int = 16 << 20
    max_depth: int = 32
    max_values: int = 500_000
    max_blobs: int = 4096
    max_blob_bytes: int = 8 << 30
    max_side: int = 32768
    max_pixels: int = 1 << 28

    @classmethod
    def of(cls, limits: RequestLimits) -> Bounds:
        """Returns the bounds for an untrusted workflow under the limits of a service."""
        return cls(
            max_json_bytes=1 << 20,
            max_values=20_000,
            max_blobs=16 + limits.max_frames,
            max_blob_bytes=limits.max_upload_bytes,
            max_side=limits.max_side,
            max_pixels=limits.max_pixels,
        )

    @property
    def max_file_bytes(self) -> int:
        """Size of a complete file: text, and blobs in base64."""
        return self.max_json_bytes + self.max_blob_bytes * 4 // 3 + (self.max_blobs << 7)


LOCAL = Bounds()  # for files of the caller's own machine
_SHOWN = 40  # characters of a refused text that an error shows


def read_json(data: bytes | str, bounds: Bounds) -> dict[str, Any]:
    """Reads the JSON text of a workflow.

    Raises:
        InvalidWorkflow: 400, not JSON, not an object, or beyond the bounds.
    """
    if len(data) > bounds.max_file_bytes:
        raise InvalidWorkflow("workflow", f"{len(data)} bytes", f"{bounds.max_file_bytes} at most")
    most = bounds.max_values + bounds.max_json_bytes  # strings may contain the tokens, too
    if count_json_tokens(data.encode() if isinstance(data, str) else data) > most:
        raise InvalidWorkflow("workflow", "too many lists and objects", f"at most {most}")
    try:
        values = json.loads(data, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as err:
        start = data[:_SHOWN] if isinstance(data, str) else data[:_SHOWN].decode(errors="replace")
        raise InvalidWorkflow("workflow", start, f"valid JSON: {err}") from err
    if not isinstance(values, dict):
        raise InvalidWorkflow("workflow", values, "an object with the fields of a workflow")
    _check_size(values, bounds)
    return values


def count_json_tokens(data: bytes) -> int:
    """Counts the tokens of a JSON text: parsed, ``[[],[],...`` takes twenty times its size."""
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _check_size(values: dict[str, Any], bounds: Bounds) -> None:
    """Checks depth, values and characters; blobs are checked when they are decoded."""
    texts = n_values = 0
    level: list[Any] = [*values, *(value for key, value in values.items() if key != "blobs")]
    for _ in range(bounds.max_depth):
        n_values += len(level)
        strings = [item for item in level if isinstance(item, str)]
        texts += sum(map(len, strings))
        if n_values > bounds.max_values or texts > bounds.max_json_bytes:
            raise InvalidWorkflow(
                "workflow",
                f"{n_values} values with {texts} characters",
                f"at most {bounds.max_values} values and {bounds.max_json_bytes} characters",
            )
        _check_characters("".join(strings))
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise InvalidWorkflow("workflow", "deeper ones", f"at most {bounds.max_depth} levels")


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        got = text[max(err.start - _SHOWN, 0) : err.start + 1]
        expected = "valid Unicode, without lone surrogates"
        raise InvalidWorkflow("workflow", got, expected) from err


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, float) and not math.isfinite(item):  # "1e999"
        raise InvalidWorkflow("workflow", item, "finite numbers")
    return item if isinstance(item, list) else []
