"""Errors that only a request over HTTP can be: of who sends it, in which form, and how much."""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar, Literal

from bentoml_diffusers.errors import DiffusersError, shorten


class UploadsFull(DiffusersError):
    """The bodies that are being read fill what all clients together may send (503).

    Attributes:
        retry_after_s: Seconds after which to try again; ``Retry-After`` of the answer.
    """

    error_code = HTTPStatus.SERVICE_UNAVAILABLE
    outcome = "refused"
    retry_after_s = 2

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"requests send {max_bytes} bytes already; try again in {self.retry_after_s} seconds"
        )


class UnsupportedMediaType(DiffusersError):
    """The body of a request is of a type that a service does not read (415)."""

    error_code = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    outcome = "invalid"

    def __init__(self, got: str, expected: str) -> None:
        self.field = "content-type"
        super().__init__(
            f"content-type: got {shorten(got) if got else 'none'}, expected {expected}"
        )


class ForbiddenRequest(DiffusersError):
    """The request names a host, or comes from a web page, that may not ask the service (403)."""

    error_code = HTTPStatus.FORBIDDEN
    outcome = "invalid"

    def __init__(self, header: str, got: str, expected: str) -> None:
        self.field = header
        super().__init__(f"{header}: {shorten(got)} may not ask this service, expected {expected}")


class RequestNotFound(DiffusersError):
    """The caller runs no request of that id (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"

    def __init__(self, request_id: str) -> None:
        self.field = "request_id"
        super().__init__(
            f"request_id: {shorten(request_id)} is none of a request that you run here; it may be "
            "done, or run in another worker"
        )


class KeyRefused(DiffusersError):
    """The request has no API key, or not one that the service knows (401)."""

    error_code = HTTPStatus.UNAUTHORIZED
    outcome = "invalid"
    _PROBLEMS: ClassVar = {
        "missing": "no key, expected 'Bearer KEY', or 'Basic' with the key as the password",
        "unreadable": "'Basic' without user:password in base64",
        "unknown": "an unknown key, or one of another user",
    }

    def __init__(self, problem: Literal["missing", "unreadable", "unknown"]) -> None:
        self.field = "authorization"
        super().__init__(f"authorization: {self._PROBLEMS[problem]}")


class TaskForbidden(DiffusersError):
    """The API key of the request is for other tasks (403)."""

    error_code = HTTPStatus.FORBIDDEN
    outcome = "invalid"

    def __init__(self, task: str, key: str) -> None:
        self.field = "authorization"
        super().__init__(f"authorization: the key {key!r} may not ask for {shorten(task)}")


class PathClosed(DiffusersError):
    """The operator has closed this path (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"

    def __init__(self, path: str) -> None:
        super().__init__(f"{shorten(path)} is closed on this service")


class QuotaExceeded(DiffusersError):
    """An API key has asked for all that it may for now (429).

    Attributes:
        retry_after_s: Seconds after which there is enough; ``Retry-After`` of the answer.
    """

    error_code = HTTPStatus.TOO_MANY_REQUESTS
    outcome = "refused"

    def __init__(self, limit: str, size: int, retry_after_s: int) -> None:
        self.field = "authorization"
        self.retry_after_s = retry_after_s
        super().__init__(
            f"authorization: the key has used up its {limit}={size}; "
            f"try again in {retry_after_s} seconds"
        )


class QuotaTooSmall(DiffusersError):
    """One request takes more than its API key may ever ask for (403)."""

    error_code = HTTPStatus.FORBIDDEN
    outcome = "invalid"

    def __init__(self, limit: str, size: int, amount: int) -> None:
        self.field = "authorization"
        super().__init__(f"authorization: the request takes {amount} of the key's {limit}={size}")
