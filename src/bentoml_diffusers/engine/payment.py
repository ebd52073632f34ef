"""Who pays for a request. Whoever lets callers in says it, and is asked before it is queued."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future


class Payer(Protocol):
    """Pays for a call, which may be several requests. Safe from any thread."""

    def expect(self, parts: int) -> None:
        """Says how many equal requests the call is, before the first of them."""

    def charge(self, task: str, pixel_steps: int) -> Receipt:
        """Takes the work of a request from the account, or raises what the caller is told."""


class Receipt(Protocol):
    """What was taken for one request."""

    def refund(self) -> None:
        """The request was not queued after all."""

    def close(self) -> None:
        """The request has ended, however it did."""


# Of the requests that this task, or what it starts, submits; ``None``: nobody.
payer: ContextVar[Payer | None] = ContextVar("payer", default=None)


def expect_parts(parts: int) -> None:
    """Says how many equal requests the call of this task is."""
    account = payer.get()
    if account is not None:
        account.expect(parts)


def charge_now(task: str, pixel_steps: int) -> None:
    """Charges for a call that is queued elsewhere, to run when its caller has gone.

    Args:
        task: What it asks for.
        pixel_steps: The work of one of its parts, see :func:`expect_parts`.
    """
    account = payer.get()
    if account is not None:
        account.charge(task, pixel_steps).close()


@contextlib.contextmanager
def charged(task: str, pixel_steps: int, future: Future[Any]) -> Iterator[None]:
    """Charges for a request that the block queues.

    Args:
        task: What it asks for.
        pixel_steps: Its work.
        future: Ends with the request.
    """
    account = payer.get()
    if account is None:
        yield
        return
    receipt = account.charge(task, pixel_steps)
    try:
        yield
    except BaseException:
        receipt.refund()
        raise
    future.add_done_callback(lambda _: receipt.close())
