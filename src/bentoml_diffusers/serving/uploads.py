"""How much of the bodies of requests is in memory: of one, and of all clients together."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import UnreadableRequest
from bentoml_diffusers.serving.refusals import UploadsFull

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request
    from starlette.types import Message

_FREE_BYTES = 64 * 1024  # of each body: who sends text only is not refused for the files of others


class UploadBudget:
    """Bytes of bodies that are being read at this moment. For the thread of one event loop.

    Args:
        max_bytes: Beyond it no body may grow, but one alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    @contextlib.contextmanager
    def bound(self, request: Request, max_bytes: int) -> Iterator[Request]:
        """Gives the request with a body that ends in an error where it gets too large.

        What it holds is free again at the end of the block, however that comes.

        Args:
            request: Its body is not read yet.
            max_bytes: Of this body.

        Raises:
            UnreadableRequest: 400, larger than ``max_bytes``.
            UploadsFull: 503, beyond what all requests may hold.
        """
        from starlette.requests import Request as BoundedRequest

        received = held = 0

        async def receive() -> Message:
            nonlocal received, held
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise UnreadableRequest([(("body",), f"more than {max_bytes} bytes")])
            more = max(0, received - _FREE_BYTES) - held
            self._take(more, held)
            held += more
            return message

        try:
            yield BoundedRequest(request.scope, receive)
        finally:
            self._held_bytes -= held

    def _take(self, more: int, held: int) -> None:
        is_alone = self._held_bytes == held
        if more and not is_alone and self._held_bytes + more > self._max_bytes:
            raise UploadsFull(self._max_bytes)
        self._held_bytes += more
