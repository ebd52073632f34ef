"""Requests in an event loop: whoever stops waiting stops the request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.engine.request import Handle, Result


async def submit_beside(submit: Callable[[], Handle]) -> Handle:
    """Submits in a thread; a request that is submitted after a cancel is cancelled, too."""
    submitting = asyncio.ensure_future(asyncio.to_thread(submit))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        submitting.add_done_callback(_cancel_submitted)
        raise


def _cancel_submitted(submitting: asyncio.Future[Handle]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


async def wait_for(handle: Handle) -> Result:
    """Waits for a request."""
    try:
        return await asyncio.wrap_future(handle.future)
    except asyncio.CancelledError:
        handle.cancel()
        raise
