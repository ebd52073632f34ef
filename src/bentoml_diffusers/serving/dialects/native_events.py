"""The events of the native API: what happens to a request, for ``Accept: text/event-stream``."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.answers import describe_file, describe_run
from bentoml_diffusers.serving.calls import Answer, Done, Queued, Step
from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.serving.error_answers import describe_error
from bentoml_diffusers.serving.event_streams import EventStream, format_event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Receive

    from bentoml_diffusers.serving.calls import Call, Event
    from bentoml_diffusers.serving.dispatcher import Dispatcher

PREVIEW_TYPE = "image/jpeg"


async def stream(
    dispatcher: Dispatcher, call: Call, receive: Receive, output_format: str
) -> EventStream:
    """Answers with events, the last of which is ``done``.

    They are ``queued``, ``progress``, ``preview``, and ``image``, ``video`` or ``audio``.

    An error after the first one is the event ``error``, and the last.

    Raises:
        DiffusersError: The call was refused before anything was sent.
    """
    events = dispatcher.stream(call, receive)
    first = await anext(events)
    return EventStream(_translate(dispatcher, first, events, output_format))


async def _translate(
    dispatcher: Dispatcher,
    first: Event,
    events: AsyncGenerator[Event, None],
    output_format: str,
) -> AsyncGenerator[bytes, None]:
    yield await _say(dispatcher, first, output_format)
    try:
        async for event in events:
            yield await _say(dispatcher, event, output_format)
    except DiffusersError as error:
        yield format_event("error", {"status": int(error.error_code), **describe_error(error)})
    finally:
        await events.aclose()


async def _say(dispatcher: Dispatcher, event: Event, output_format: str) -> bytes:
    if isinstance(event, Queued):
        return format_event("queued", {"position": event.position, "seconds": event.seconds})
    if isinstance(event, Answer):
        return format_event("done", describe_run(event))
    if isinstance(event, Done):
        encoded = await dispatcher.encode(event.result, output_format)
        said = {"index": event.index, **describe_file(event.result, encoded.facts)}
        return format_event(encoded.facts.kind, {**said, "data": _as_text(encoded.data)})
    said = {"index": event.index, "step": event.step, "of": event.of}
    if isinstance(event, Step):
        return format_event("progress", {**said, "seconds_left": event.seconds_left})
    data = await asyncio.to_thread(encode_image, event.image, "jpeg")
    return format_event("preview", {**said, "media_type": PREVIEW_TYPE, "data": _as_text(data)})


def _as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
