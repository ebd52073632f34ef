"""uvicorn, as BentoML starts it."""

from __future__ import annotations

from typing import Any

_MIN_BODY_BYTES = 10 * 1024  # in each period, until the body is whole


def bound_connections(
    *, receive_timeout_s: float, send_timeout_s: float, max_connections: int
) -> None:
    """Bounds what a slow client can hold, in the HTTP server that this process starts after it.

    BentoML gives no access to uvicorn's settings, and uvicorn has none for slow heads, bodies and
    readers: half a head stays for ever. So its protocol gets a subclass. Until uvicorn bounds them
    (not in 0.54), and BentoML lets the settings through (not in 1.4.40).

    Args:
        receive_timeout_s: In which a client must send a head, and again and again 10 KiB of a body.
        send_timeout_s: In which it must take something of an answer.
        max_connections: At once; beyond it the one is closed that has been quiet longest.
    """
    from uvicorn.protocols.http import auto

    current: Any = auto.AutoHTTPProtocol
    plain: type = getattr(current, "plain", current)
    bounds = {
        "plain": plain,
        "receive_timeout_s": receive_timeout_s,
        "send_timeout_s": send_timeout_s,
        "max_connections": max_connections,
    }
    auto.AutoHTTPProtocol = type("BoundedProtocol", (_Bounded, plain), bounds)


class _Bounded:
    """Closes connections that wait for their client, as a mixin for uvicorn's protocols.

    Attributes:
        quiet_since: When the client last sent something, by the clock of the event loop.
    """

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int
    _timer: Any = None
    _sending: Any = None
    _head_since: float | None = None  # when the head began that is not whole yet
    _received = 0
    _before = 0
    quiet_since = 0.0

    def connection_made(self: Any, transport: Any) -> None:
        """A client has come."""
        self._make_room()
        super().connection_made(transport)  # type: ignore[misc]
        if len(self.connections) > self.max_connections:
            transport.close()
        self.quiet_since = self._head_since = self.loop.time()
        self._watch(self.receive_timeout_s)

    def data_received(self: Any, data: bytes) -> None:
        """Something of a head or a body."""
        self._received += len(data)
        super().data_received(data)  # type: ignore[misc]
        self.quiet_since = self.loop.time()
        if self.is_served:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.quiet_since
        if self._timer is None:
            self._watch(self.receive_timeout_s)

    def connection_lost(self: Any, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        for timer in (self._timer, self._sending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)  # type: ignore[misc]

    def pause_writing(self: Any) -> None:
        """The client does not read the answer as fast as it comes."""
        self._sending = self.loop.call_later(self.send_timeout_s, self.transport.abort)
        super().pause_writing()  # type: ignore[misc]

    def resume_writing(self: Any) -> None:
        """It has read some."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        super().resume_writing()  # type: ignore[misc]

    @property
    def is_served(self: Any) -> bool:
        """True while a request runs whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self: Any, delay_s: float) -> None:
        self._before = self._received
        self._timer = self.loop.call_later(delay_s, self._look)

    def _look(self: Any) -> None:
        """After a period in which the client could send something."""
        self._timer = None
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        period_s = self.receive_timeout_s
        if not self.is_served:
            self._look_at_head(period_s)
        elif self.cycle.more_body:
            is_moving = self._received - self._before >= _MIN_BODY_BYTES
            if is_moving or self.flow.read_paused:
                self._watch(period_s)
            else:
                self.transport.close()

    def _look_at_head(self: Any, period_s: float) -> None:
        if self.timeout_keep_alive_task is not None or self._head_since is None:
            return  # between two requests, which uvicorn bounds
        left_s = self._head_since + period_s - self.loop.time()
        if left_s > 0.001:
            self._watch(left_s)
        else:
            self.transport.close()

    def _make_room(self: Any) -> None:
        """Sends away who has been quiet longest, of those who are not served."""
        if len(self.connections) < self.max_connections:
            return
        quiet = [one for one in self.connections if not getattr(one, "is_served", True)]
        if quiet:
            longest = min(quiet, key=lambda one: float(one.quiet_since))
            self.connections.discard(longest)
            longest.transport.abort()
