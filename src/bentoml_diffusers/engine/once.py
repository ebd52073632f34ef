"""Slow values that are computed once."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.engine.requests import Ticket

T = TypeVar("T")
_POLL_S = 0.1


class Once(Generic[T]):
    """A value that its own thread computes on first use.

    So a request can stop waiting for it, which ``functools.cached_property`` does not allow; up to
    Python 3.11 that even has one lock for all instances of a class.

    Args:
        compute: Returns the value. What it raises is raised for all who are waiting; the next
            call computes it again.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._computed: Future[T] | None = None

    def get(self, ticket: Ticket) -> T:
        """Returns the value.

        Raises:
            RequestCancelled: 503, the request was cancelled while it waited.
            DeadlineExceeded: 504, its time is over.
        """
        computed = self._start()
        while not computed.done():
            ticket.check()
            wait([computed], _POLL_S)
        return computed.result()

    def _start(self) -> Future[T]:
        with self._lock:
            known = self._computed
            if known is None or (known.done() and known.exception() is not None):
                known = self._computed = Future()
                threading.Thread(target=self._fill, args=(known,), daemon=True).start()
            return known

    def _fill(self, computed: Future[T]) -> None:
        try:
            computed.set_result(self._compute())
        except BaseException as err:  # noqa: BLE001 - passed on through the future
            computed.set_exception(err)
