"""Who may ask a service: not a foreign web page in the browser of whoever runs it.

Without this, any page can send a form to ``http://localhost:3000``, or let a name of its own point
at the loopback address (DNS rebinding), and spend the device.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from bentoml_diffusers import _compat
from bentoml_diffusers.serving.callers import is_loopback
from bentoml_diffusers.serving.refusals import ForbiddenRequest

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Receive, Scope, Send


class Gate:
    """ASGI middleware that refuses with 403 what comes by another name, or from another site.

    Args:
        app: What it guards.
        service_name: By which BentoML knows where the service listens.
        allowed_hosts: Names for the header ``Host``, beside those of the loopback address;
            ``None`` takes any from programs and proxies, but none that a web page chose. Where the
            service listens on the loopback address only, it is none.
        cors_origins: Of pages that may ask, beside those that BentoML's ``http.cors`` allows.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service_name: str,
        allowed_hosts: Collection[str] | None,
        cors_origins: Collection[str] = (),
    ) -> None:
        self.app = app
        self._origins = frozenset(cors_origins)
        self._names = None if allowed_hosts is None else {name.lower() for name in allowed_hosts}
        if self._names is None and is_loopback(_compat.bound_host(service_name)):
            self._names = set()
        self._is_allowed_origin = _compat.find_origin_check()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers with the error."""
        try:
            if scope["type"] in ("http", "websocket"):
                self._check(scope, Headers(scope=scope))
        except ForbiddenRequest as err:
            detail = [{"loc": [err.field], "msg": str(err)}]
            answer = JSONResponse({"error": str(err), "detail": detail}, status_code=403)
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if host and not self._is_known(_name_of(host)):
            expected = "localhost, or a name in allowed_hosts of the service"
            raise ForbiddenRequest("host", host, expected)
        origin = headers.get("origin", "")
        if scope.get("method") != "POST":
            return
        if self._names is None and _is_rebound(host, origin):
            expected = "a name in allowed_hosts of the service (--allowed-host), or an address"
            raise ForbiddenRequest("host", host, expected)
        if self._is_foreign(headers, host, origin):
            expected = "a page of this service, or one that BentoML's http.cors allows"
            raise ForbiddenRequest("origin", origin or "another site", expected)

    def _is_known(self, name: str) -> bool:
        if self._names is None or name in self._names:
            return True
        return name == "localhost" or name.endswith(".localhost") or is_loopback(name)

    def _is_foreign(self, headers: Headers, host: str, origin: str) -> bool:
        """Browsers say where a request is from; older ones only name the page.

        Its name is compared with ``Host`` on the loopback address only: proxies may rewrite that.
        """
        site = headers.get("sec-fetch-site")
        if site is None and origin and self._names is not None:
            site = "same-origin" if urlsplit(origin).netloc == host else "cross-site"
        return site == "cross-site" and not self._is_allowed(origin)

    def _is_allowed(self, origin: str) -> bool:
        return bool(self._origins & {"*", origin}) or self._is_allowed_origin(origin)


def _is_rebound(host: str, origin: str) -> bool:
    """True for a page that may have pointed a name of its own at this machine.

    Its name and port are then those of the service, and it cannot have a certificate. A proxy in
    front of the service passes on a name without a port, or is asked by ``https``; what is no
    domain, such as an address or the name of a machine in its network, cannot be anybody's.
    """
    page = urlsplit(origin)
    name = _name_of(host)
    has_port = host.rpartition("]")[2].rpartition(":")[2].isdigit()
    is_domain = "." in name and not _is_address(name) and not name.endswith(".localhost")
    return page.scheme == "http" and page.netloc.lower() == host.lower() and has_port and is_domain


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """Returns a ``Host`` without its port: ``[::1]:3000`` is ``::1``."""
    name = host.lower().rpartition("]")[0] or host.lower().partition(":")[0]
    return name.lstrip("[").rstrip(".")
