"""Options of a service that say who may call it, and what of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Sequence

Access = Literal["open", "key", "closed"]


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """Which API keys a service takes; with them each request needs one.

    A limit here is that of each key that has none of its own.

    Attributes:
        file: File of ``bentoml diffusers key add``. It is read again when it changes, so a key that
            is removed is refused from the next request on.
        variable: Environment variable with ``alice=KEY, bob=sha256:HASH``.
        requests_per_minute: Requests that a key may start in a minute (any number).
        pixel_steps_per_minute: Pixels times images times steps that it may ask for in a minute
            (any number). 20 steps at 1024 x 1024 are 21 million.
        max_running: Requests that it may have at once, those that wait included (any number).
    """

    file: str | None = None
    variable: str | None = None
    requests_per_minute: int | None = None
    pixel_steps_per_minute: int | None = None
    max_running: int | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.variable is None:
            raise InvalidOption("keys", None, "a file, a variable, or both")
        for name in ("requests_per_minute", "pixel_steps_per_minute", "max_running"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidOption(name, value, "an integer from 1")


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """What of a service can be reached, and by whom.

    ``"open"`` is for everyone, ``"key"`` for whoever may ask for an image: with a key where the
    service has keys, else everyone; ``"closed"`` for nobody, with a 404. ``/livez``, ``/readyz``
    and ``/healthz`` are always open.

    Attributes:
        metrics: ``GET /metrics``, which names all keys: a key needs the task ``metrics``.
        adapters: ``POST /adapters``.
        replay: ``POST /replay``.
        docs: The page at ``/`` and what it loads, ``GET /docs.json`` and ``/schema.json``; what the
            service can (``/capabilities``, ``/models``) is for whoever may call.
        cors_origins: Origins whose web pages may call the service, such as
            ``"https://images.example.com"``; ``"*"`` for all.
        receive_timeout_s: Seconds, from 1, in which a client must send the head of a request, and
            again and again 10 KiB of its body.
        send_timeout_s: Seconds, from 1, in which it must take something of an answer.
        max_connections: Connections to a worker at once, from 8. Beyond it the one that has been
            idle longest is closed.
    """

    metrics: Access = "key"
    adapters: Access = "key"
    replay: Access = "key"
    docs: Access = "open"
    cors_origins: Sequence[str] = ()
    receive_timeout_s: float = 20.0
    send_timeout_s: float = 60.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "Access" and value not in get_args(Access):
                raise InvalidOption(item.name, value, f"one of {', '.join(get_args(Access))}")
        origins = self.cors_origins
        if isinstance(origins, str) or not all(map(_is_origin, origins)):
            raise InvalidOption("cors_origins", origins, "origins such as 'https://example.com'")
        object.__setattr__(self, "cors_origins", tuple(origins))
        for name in ("receive_timeout_s", "send_timeout_s"):
            if not getattr(self, name) >= 1:
                raise InvalidOption(name, getattr(self, name), "seconds from 1")
        if type(self.max_connections) is not int or self.max_connections < 8:
            raise InvalidOption("max_connections", self.max_connections, "an integer from 8")

    def of_path(self, path: str, method: str) -> Access:
        """Returns who may ask for a path."""
        first = path.strip("/").partition("/")[0]
        is_read = method in ("GET", "HEAD")
        if is_read and first in _HEALTH:
            return "open"
        if is_read and first in _PAGES:
            return self.docs
        access: Access = getattr(self, first) if first in _SECTIONS else "key"
        return access


_HEALTH = ("livez", "readyz", "healthz")
_PAGES = ("", "docs", "docs.json", "schema.json", "static_content", "assets")
_SECTIONS = ("metrics", "adapters", "replay")


def _is_origin(value: object) -> bool:
    if value == "*":
        return True
    is_web = isinstance(value, str) and value.startswith(("http://", "https://"))
    return is_web and "/" not in str(value).partition("://")[2]
