"""Server-sent events: answers that say what happens while it happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 15.0  # proxies close what is silent for 30 to 60 seconds
_KEEP_ALIVE = b": keep-alive\n\n"


def format_event(name: str, data: Mapping[str, Any] | str) -> bytes:
    """Returns one event of a stream.

    Args:
        name: Of the event; without one if it is empty.
        data: A text without line breaks, or what becomes JSON.
    """
    text = data if isinstance(data, str) else json.dumps(data)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come, and comments where none comes for a while.

    Args:
        events: What :func:`format_event` returns. It ends by itself when its client goes away, as
            :meth:`Dispatcher.stream` does with the ``receive`` of the request.
        headers: Of the answer.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # else nginx collects them
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request."""
        del scope, receive
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async with contextlib.aclosing(self._events) as events:
            while chunk := await self._next(events, send):
                await _send_body(send, chunk)
        await _send_body(send, b"", more=False)
        if self.background is not None:
            await self.background()

    async def _next(self, events: AsyncGenerator[bytes, None], send: Send) -> bytes:
        """Returns the next event, nothing at the end."""
        coming = asyncio.ensure_future(anext(events, b""))
        try:
            while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_S))[0]:
                await _send_body(send, _KEEP_ALIVE)
            return coming.result()
        finally:
            coming.cancel()


async def _send_body(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
