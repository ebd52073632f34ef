"""What a job is, and what can go wrong with one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from bentoml_diffusers.errors import DiffusersError, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

# In Replicate's words, which its clients know.
Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "canceled")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is in the table.

    Attributes:
        id: By which its caller finds it.
        owner: Name of the caller's key, or an address.
        task: Of the engine.
        values: Of the native fields, as JSON; the seed is drawn, adapters have their versions.
        n: Images.
        output_format: Of the images.
        asked: What the caller sent, as it is shown again.
        priority: Higher ones begin first.
        status: What becomes of it.
        attempt: How often it was begun.
        worker: What runs it.
        step: Denoising steps done.
        of: Denoising steps in all; 0 until that is known.
        files: Names of its images.
        seeds: Of the images.
        error: Why it failed.
        created: Seconds since 1970, as all moments.
        started: When it was begun for the last time.
        ended: When it ended.
        cancelling: Its worker is to stop it.
    """

    id: str
    owner: str
    task: str
    values: Mapping[str, Any]
    n: int = 1
    output_format: str = "png"
    asked: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    status: Status = "starting"
    attempt: int = 0
    worker: str | None = None
    step: int = 0
    of: int = 0
    files: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    error: str | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    cancelling: bool = False

    @property
    def is_over(self) -> bool:
        """True once nothing will change any more."""
        return self.status in ENDED

    @property
    def fingerprint(self) -> str:
        """The same for the same wish of the same caller: drawn seeds do not count."""
        wish = [self.owner, self.asked]
        return hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest()


class JobNotFound(DiffusersError, LookupError):
    """The caller has no job of that id (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"

    def __init__(self, job_id: str) -> None:
        self.field = "id"
        super().__init__(f"id: you have no job {shorten(job_id)}; it may be deleted by now")


class JobConflict(DiffusersError, ValueError):
    """The id is that of another job (409)."""

    error_code = HTTPStatus.CONFLICT
    outcome = "invalid"

    def __init__(self, job_id: str) -> None:
        self.field = "id"
        super().__init__(f"id: {shorten(job_id)} is another job already; give each its own id")


class JobsFull(DiffusersError):
    """Too many jobs wait (429).

    Attributes:
        retry_after_s: Seconds after which to try again.
    """

    error_code = HTTPStatus.TOO_MANY_REQUESTS
    outcome = "refused"
    retry_after_s = 10

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs wait already; try again in {self.retry_after_s} seconds")
