"""A stream of partial images, and the final ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.calls import Done, Preview
from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.serving.dialects.openai.errors import describe_error, error_response
from bentoml_diffusers.serving.dialects.openai.wire import (
    completed_event,
    error_event,
    partial_event,
)
from bentoml_diffusers.serving.event_streams import EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.responses import Response
    from starlette.types import Receive

    from bentoml_diffusers.serving.calls import Call, Event
    from bentoml_diffusers.serving.dialects.openai.orders import Order
    from bentoml_diffusers.serving.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

_EARLY_S = 1.0


async def answer_stream(
    dispatcher: Dispatcher, call: Call, order: Order, receive: Receive
) -> Response:
    """Returns a stream of events that ends with the final images or with an error.

    What is refused at once is answered with its status: clients try again by that.

    Args:
        dispatcher: Runs the call.
        call: What to run.
        order: What it was translated from.
        receive: Of the HTTP request: a client that goes away stops it.
    """
    events = dispatcher.stream(call, receive)
    try:
        await anext(events)  # that it was queued
        first = asyncio.ensure_future(anext(events))
        await asyncio.wait({first}, timeout=_EARLY_S)
        if first.done():
            first.result()
    except DiffusersError as error:
        return error_response(error, order.names)
    return EventStream(_write_events(_Writer(dispatcher, order), first, events))


async def _write_events(
    writer: _Writer, first: asyncio.Future[Event], events: AsyncGenerator[Event, None]
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        try:
            if written := await writer.write(await first):
                yield written
            async for event in events:
                if written := await writer.write(event):
                    yield written
        except DiffusersError as error:
            yield writer.write_error(error)
        except Exception:  # a stream that just ends is a success for its client
            logger.exception("a stream failed")
            yield error_event({"message": "the server failed", "type": "server_error"})


class _Writer:
    """Writes the events of one stream."""

    def __init__(self, dispatcher: Dispatcher, order: Order) -> None:
        self._dispatcher = dispatcher
        self._order = order
        self._partial_images = 0

    async def write(self, event: Event) -> bytes:
        """Returns an event as OpenAI's clients read it; nothing for a step."""
        if isinstance(event, Preview):
            return await self._write_preview(event)
        return await self._write_result(event) if isinstance(event, Done) else b""

    def write_error(self, error: DiffusersError) -> bytes:
        """Returns the event that ends a stream without an image."""
        return error_event(describe_error(error, self._order.names))

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
