"""A stream of partial images, and the final ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, TypeVar

from starlette.responses import Response, StreamingResponse

from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.calls import Done, Preview, Queued
from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.serving.dialects.openai.errors import (
    describe_error,
    error_response,
)
from bentoml_diffusers.serving.dialects.openai.wire import (
    completed_event,
    error_event,
    partial_event,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from bentoml_diffusers.serving.calls import Call, Event
    from bentoml_diffusers.serving.dialects.openai.orders import Order
    from bentoml_diffusers.serving.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SILENCE_S = 1.0
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def answer_stream(dispatcher: Dispatcher, call: Call, order: Order) -> Response:
    """Returns a stream of events; what is refused at once is answered with its status.

    It ends with the final images or with an error, and is cancelled when its client goes away.
    """
    feed = with_silences(dispatcher.stream(call), _SILENCE_S)
    try:
        first = await anext(feed)
        while isinstance(first, Queued):
            first = await anext(feed)
    except DiffusersError as error:
        return error_response(error, order.names)
    events = _write_events(dispatcher, order, first, feed)
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)


async def with_silences(
    events: AsyncGenerator[T, None], seconds: float
) -> AsyncGenerator[T | None, None]:
    """Yields events, and ``None`` whenever so many seconds go by without one."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield None
                continue
            event, pending = pending, None
            with contextlib.suppress(StopAsyncIteration):
                yield event.result()
                continue
            return
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
        await events.aclose()


async def _write_events(
    dispatcher: Dispatcher,
    order: Order,
    first: Event | None,
    feed: AsyncGenerator[Event | None, None],
) -> AsyncIterator[bytes]:
    writer = _Writer(dispatcher, order)
    async with contextlib.aclosing(feed):
        try:
            yield await writer.write(first)
            async for event in feed:
                yield await writer.write(event)
        except DiffusersError as error:
            yield error_event(describe_error(error, order.names))
        except Exception:  # a stream that just ends is a success for its client
            logger.exception("a stream of %s failed", order.task)
            yield error_event({"message": "the server failed", "type": "server_error"})


class _Writer:
    """Writes the events of one stream."""

    def __init__(self, dispatcher: Dispatcher, order: Order) -> None:
        self._dispatcher = dispatcher
        self._order = order
        self._partial_images = 0

    async def write(self, event: Event | None) -> bytes:
        """Returns an event as OpenAI's clients read it; nothing for a step."""
        if event is None:
            return _KEEP_ALIVE
        if isinstance(event, Preview):
            return await self._write_preview(event)
        return await self._write_result(event) if isinstance(event, Done) else b""

    async def _write_preview(self, event: Preview) -> bytes:
        request, index = self._order.request, self._partial_images
        self._partial_images += 1
        file = await asyncio.to_thread(
            encode_image, event.image, request.output_format, quality=request.compression
        )
        return partial_event(self._order.kind, request, file, event.image.size, index)

    async def _write_result(self, event: Done) -> bytes:
        request, result = self._order.request, event.result
        encoded = await self._dispatcher.encode(result, request.output_format, request.compression)
        more = {"seed": result.seeds[0]} if result.seeds else {}
        size = result.images[0].size
        return completed_event(self._order.kind, request, encoded.data, size, **more)
