"""A bounded cache in host memory of what was read from files."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from bentoml_diffusers.adapters.files import list_outdated

if TYPE_CHECKING:
    from collections.abc import Callable


class Sized(Protocol):
    """Something in host memory."""

    @property
    def name(self) -> str:
        """Its name, for reports."""

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""


T = TypeVar("T", bound=Sized)


@dataclass
class Counts:
    """Statistics of a cache: hits, misses, and the time spent reading."""

    hits: int = 0
    misses: int = 0
    load_s: float = 0.0


class HostCache(Generic[T]):
    """The most recently used files, up to a total size. Thread-safe.

    Two threads that ask for the same file read it once.

    Args:
        max_bytes: Largest total size; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.counts = Counts()
        self._held: OrderedDict[object, T] = OrderedDict()
        self._loading: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: object, load: Callable[[], T]) -> T:
        """Returns the value cached under ``key``, else that of ``load``; its errors propagate."""
        with self._lock:
            gate = self._loading.setdefault(key, threading.Lock())
        try:
            with gate:
                found = self._find(key)
                if found is None:
                    started = time.perf_counter()
                    found = load()
                    self._keep(key, found, time.perf_counter() - started)
            return found
        finally:
            with self._lock:
                self._loading.pop(key, None)

    def names(self) -> list[str]:
        """Returns the names of the cached values."""
        with self._lock:
            return [value.name for value in self._held.values()]

    def clear(self) -> None:
        """Empties the cache."""
        with self._lock:
            self._held.clear()
            self.n_bytes = 0

    def _find(self, key: object) -> T | None:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self.counts.hits += 1
            return found

    def _keep(self, key: object, value: T, load_s: float) -> None:
        with self._lock:
            self.counts.misses += 1
            self.counts.load_s += load_s
            # Another thread may have read it too, if the first attempt failed.
            known = [key] if key in self._held else []
            for old in [*known, *list_outdated(self._held, key)]:
                self.n_bytes -= self._held.pop(old).n_bytes
            if value.n_bytes > self.max_bytes:
                return
            self._held[key] = value
            self.n_bytes += value.n_bytes
            while self.n_bytes > self.max_bytes:
                _, oldest = self._held.popitem(last=False)
                self.n_bytes -= oldest.n_bytes
