"""The patterns by which PEFT's config gives some layers another rank or alpha."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLAIN = re.compile(r"\^?[\w.]+")


class Patterns:
    r"""Values by pattern; the first that matches a layer counts, as in PEFT.

    PEFT tries ``(.*\\.)?(pattern)$`` from the start of the layer's path, one pattern after the
    other. Files have one pattern for each layer, so names without regex characters are looked
    up instead.

    Args:
        values: As in ``LoraConfig.alpha_pattern``.
    """

    def __init__(self, values: Mapping[str, Any] | None) -> None:
        self._values = list((values or {}).items())
        self._names = {
            key: index
            for index, (key, _) in reversed(list(enumerate(self._values)))
            if _PLAIN.fullmatch(key)
        }
        self._expressions = [
            (index, _compiled(key))
            for index, (key, _) in enumerate(self._values)
            if not _PLAIN.fullmatch(key)
        ]

    def find(self, layer: str, default: Any) -> Any:
        """Returns the value for a layer."""
        if not self._values:  # the common case, and this is called for each layer
            return default
        parts = layer.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        indices = [self._names[end] for end in (f"^{layer}", *ends) if end in self._names]
        first = min(indices, default=len(self._values))
        for index, expression in self._expressions:
            if index < first and expression.match(layer):
                first = index
                break
        return self._values[first][1] if first < len(self._values) else default


@functools.lru_cache(maxsize=256)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
