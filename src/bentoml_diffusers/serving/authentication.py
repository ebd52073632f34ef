"""The door of a service with keys: who comes in, to what, and how often."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeAlias

from starlette.datastructures import Headers

from bentoml_diffusers.engine import payer
from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.serving.calls import KEY
from bentoml_diffusers.serving.keys import KeyRing, Visit
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.refusals import KeyRefused, PathClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from bentoml_diffusers.serving.access import AccessOptions, KeyOptions
    from bentoml_diffusers.serving.keys import Account

_CHALLENGE = 'Bearer realm="diffusers", Basic realm="diffusers", charset="UTF-8"'
Answer: TypeAlias = "Callable[[str, DiffusersError], Response]"


class Authentication:
    """ASGI middleware that lets in who may call.

    The name of its key is in the scope: see :meth:`Caller.of`.

    Args:
        app: What it guards.
        access: What is open, and what closed.
        keys: Whom it knows; ``None``: all are let in. They are read here, in each worker.
        answer: Writes an error in the form of the dialect that a path belongs to.

    Raises:
        InvalidOption: 400, the keys cannot be read.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: AccessOptions,
        keys: KeyOptions | None,
        answer: Answer,
    ) -> None:
        self.app = app
        self._access = access
        self._keys = None if keys is None else KeyRing(keys)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers with the error."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            account = self._find_account(scope)
        except DiffusersError as err:
            await self._refuse(err, scope, receive, send)
            return
        if account is None:
            await self.app(scope, receive, send)
            return
        note = _Status(send)
        with _paid_by(account, scope):
            try:
                await self.app(scope, receive, note.send)
            finally:
                process_metrics().note_call(account.name, note.code)

    def _find_account(self, scope: Scope) -> Account | None:
        path = scope["path"]
        access = self._access.of_path(path, scope.get("method", ""))
        if access == "closed":
            raise PathClosed(path)
        is_neighbour = (scope.get("server") or ("", 0))[1] is None  # by a Unix socket
        is_question = scope.get("method") == "OPTIONS"  # of a browser, which sends no key with it
        if self._keys is None or access == "open" or is_neighbour or is_question:
            return None
        account = self._keys.find(Headers(scope=scope))
        if path.strip("/") == "metrics":
            account.check_task("metrics")
        return account

    async def _refuse(
        self, err: DiffusersError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = self._answer(scope["path"], err)
        if isinstance(err, KeyRefused):
            answer.headers["www-authenticate"] = _CHALLENGE
        await answer(scope, receive, send)


@contextlib.contextmanager
def _paid_by(account: Account, scope: Scope) -> Iterator[None]:
    """Runs the block as a call of an account."""
    scope[KEY] = (account.name, account.priority)
    token = payer.set(Visit(account))
    try:
        yield
    finally:
        payer.reset(token)


class _Status:
    """Notes the status that a request is answered with."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.code = 499  # as nginx says where the client left before

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
        await self._send(message)
