"""``x-request-id``: what a client calls its request, or what it is called here."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = "bentoml_diffusers.request_id"  # in the scope of a request
_HEADER = b"x-request-id"


def find_request_id(scope: Scope) -> str:
    """Returns the id of a request: the one that it came with, if it is sane, else a new one."""
    if _KEY not in scope:
        given = dict(scope.get("headers", ())).get(_HEADER, b"").decode("latin-1")
        scope[_KEY] = given if _SANE.fullmatch(given) else secrets.token_hex(16)
    found: str = scope[_KEY]
    return found


class RequestIds:
    """ASGI middleware that puts the id of a request on its answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = (_HEADER, find_request_id(scope).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, send_with_id)
