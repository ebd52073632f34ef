"""Clients that go away while they are answered."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive

    from bentoml_diffusers.serving.running import Run


@contextlib.contextmanager
def watching(receive: Receive | None, run: Run) -> Iterator[None]:
    """Cancels a run if its client goes away before the end of the block.

    Args:
        receive: Of its HTTP request, whose body was read; ``None`` watches nothing.
        run: What to cancel.
    """
    if receive is None:
        yield
        return
    watch = asyncio.ensure_future(_wait_for_disconnect(receive, run))
    try:
        yield
    finally:
        watch.cancel()


async def _wait_for_disconnect(receive: Receive, run: Run) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body, read before
    run.cancel("the client went away")
