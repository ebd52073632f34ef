"""Attention processors that a request sets on the shared modules."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

Changes = list[tuple[Any, Any]]


class AttentionProcessors:
    """The original attention processors of shared modules, as set while no request runs.

    Some pipelines replace them while they run: perturbed attention guidance (PAG) by ones that
    cut the batch into thirds, self attention guidance by one that stores what it sees. Such
    processors would run in the forwards of all requests. Any replaced processor is detected, for
    every pipeline class.

    Args:
        modules: The shared modules.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._layers: list[Any] = [
            layer
            for module in modules
            for layer in module.modules()
            if hasattr(layer, "processor") and hasattr(layer, "set_processor")
        ]
        self._known = self._read()

    def note(self) -> None:
        """Saves the current ones."""
        self._known = self._read()

    def take_back(self) -> Changes:
        """Restores the saved ones, and returns those that were set."""
        now = self._read()
        if all(map(operator.is_, now, self._known)):
            return []
        pairs = zip(self._layers, now, self._known, strict=True)
        changed = [(layer, new, old) for layer, new, old in pairs if new is not old]
        for layer, _, old in changed:
            layer.set_processor(old)
        return [(layer, new) for layer, new, _ in changed]

    def put(self, changes: Changes) -> None:
        """Sets those that :meth:`take_back` returned."""
        for layer, processor in changes:
            layer.set_processor(processor)

    def _read(self) -> Sequence[Any]:
        return [layer.processor for layer in self._layers]
