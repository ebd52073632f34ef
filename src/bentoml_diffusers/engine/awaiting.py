"""Requests in an event loop: whoever stops waiting stops the request."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.engine.request import Handle, Result


async def submit_beside(submit: Callable[[], Handle]) -> Handle:
    """Submits in a thread; a request that is submitted after a cancel is cancelled, too."""
    submitted: Future[Handle] = Future()
    try:
        await asyncio.to_thread(_submit_into, submitted, submit)
        return submitted.result()
    except asyncio.CancelledError:
        submitted.add_done_callback(_cancel_submitted)
        raise


def _submit_into(submitted: Future[Handle], submit: Callable[[], Handle]) -> None:
    try:
        submitted.set_result(submit())
    except BaseException as err:  # noqa: BLE001 - handed to the caller by the future
        submitted.set_exception(err)


def _cancel_submitted(submitted: Future[Handle]) -> None:
    if submitted.exception() is None:
        submitted.result().cancel()


async def wait_for(handle: Handle) -> Result:
    """Waits for a request."""
    try:
        return await asyncio.wrap_future(handle.future)
    except asyncio.CancelledError:
        handle.cancel()
        raise
