"""Requests in an event loop: cancelling the awaiting task cancels the request."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from bentoml_diffusers.engine.requests import Handle, Result


async def submit_beside(submit: Callable[[], Handle]) -> Handle:
    """Submits in a thread; if cancelled meanwhile, cancels the request once it is submitted."""
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
    except BaseException as err:  # noqa: BLE001 - passed to the caller through the future
        submitted.set_exception(err)


def _cancel_submitted(submitted: Future[Handle]) -> None:
    if submitted.exception() is None:
        submitted.result().cancel()


async def wait_for(handle: Handle) -> Result:
    """Waits for a request."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    # Not by `asyncio.wrap_future`, which raises in the thread of the request if the loop is closed.
    handle.future.add_done_callback(lambda _: tell(loop, ended.set))
    try:
        await ended.wait()
    except asyncio.CancelledError:
        handle.cancel()
        raise
    return handle.result(0)


def tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> bool:
    """Calls a function in another thread's event loop; ``False`` if that is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # raised only by a closed loop
        return False
    return True
