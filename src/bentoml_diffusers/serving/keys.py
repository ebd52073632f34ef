"""Who calls a service, by its API key."""

from __future__ import annotations

import base64
import contextlib
import hmac
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import DiffusersError, InvalidOption
from bentoml_diffusers.serving.key_file import (
    KeyRecord,
    check_keys,
    hash_key,
    read_keys,
    read_pairs,
)
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.quotas import Bucket, Places
from bentoml_diffusers.serving.refusals import KeyRefused, TaskForbidden

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.serving.access import KeyOptions

logger = logging.getLogger(__name__)

_NAMED_ONLY = frozenset({"metrics"})  # not among the tasks of a key that names none


class Account:
    """What the owner of a key may do, and what is left of it.

    Args:
        record: Of the key.
        options: Limits that the key leaves open.

    Attributes:
        name: Of the key.
        priority: Of its requests.
    """

    def __init__(self, record: KeyRecord, options: KeyOptions) -> None:
        self.record = record
        self.name = record.name
        self.priority = record.priority

        def limit(name: str) -> int | None:
            own: int | None = getattr(record, name)
            return getattr(options, name) if own is None else own

        self.requests = Bucket("requests_per_minute", limit("requests_per_minute"))
        self.work = Bucket("pixel_steps_per_minute", limit("pixel_steps_per_minute"))
        self.places = Places(limit("max_running"))

    def check_task(self, task: str) -> None:
        """Checks that it may ask for a task.

        Raises:
            TaskForbidden: 403.
        """
        tasks = self.record.tasks
        if task not in tasks and (tasks or task in _NAMED_ONLY):
            raise TaskForbidden(task, self.name)


class Visit:
    """One call with a key; it is paid with its first request. Safe from any thread.

    Args:
        account: Who pays.
    """

    def __init__(self, account: Account) -> None:
        self.account = account
        self._lock = threading.Lock()
        self._expected = 1
        self._prepaid = 0  # requests to come that are paid
        self._open = 0  # requests that have not ended
        self._began: float | None = None  # while it has a place

    def expect(self, parts: int) -> None:
        """Says how many equal requests the call is."""
        self._expected = parts

    def charge(self, task: str, pixel_steps: int) -> Charge:
        """Takes the whole call from what the key may ask for, with the first of its requests.

        Raises:
            TaskForbidden: 403, the key is for other tasks.
            QuotaExceeded: 429, beyond what it may ask for now.
            QuotaTooSmall: 403, always beyond it.
        """
        self.account.check_task(task)
        with self._lock, contextlib.ExitStack() as undo:
            if not self._prepaid:
                self._pay(pixel_steps * self._expected, undo)
            if self._began is None:
                self._began = self.account.places.take()
            undo.pop_all()
            self._prepaid = (self._prepaid or self._expected) - 1
            self._open += 1
        return Charge(self, pixel_steps)

    def _pay(self, pixel_steps: int, undo: contextlib.ExitStack) -> None:
        for bucket, amount in ((self.account.work, pixel_steps), (self.account.requests, 1)):
            bucket.take(amount)
            undo.callback(bucket.give_back, amount)

    def leave(self, *, is_done: bool) -> None:
        """Notes that a request has ended; with none left the call has no place any more."""
        with self._lock:
            self._open -= 1
            if not self._open and self._began is not None:
                self.account.places.leave(self._began, is_done=is_done)
                self._began = None


@dataclass(frozen=True)
class Charge:
    """What was paid for one request.

    Attributes:
        visit: Of which it is a part.
        pixel_steps: Its work.
    """

    visit: Visit
    pixel_steps: int

    def refund(self) -> None:
        """For a request that was not queued."""
        account = self.visit.account
        account.work.give_back(self.pixel_steps)
        account.requests.give_back(1)
        self.visit.leave(is_done=False)

    def close(self) -> None:
        """For a request that has ended."""
        process_metrics().note_work(self.visit.account.name, self.pixel_steps)
        self.visit.leave(is_done=True)


@dataclass
class KeyRing:
    """The keys of a service.

    Args:
        options: Where they are.

    Raises:
        InvalidOption: 400, they cannot be read.
    """

    options: KeyOptions
    _accounts: dict[str, Account] = field(default_factory=dict, init=False)
    _stamp: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._stamp = self._look()
        self._take(self._read())

    def find(self, headers: Mapping[str, str]) -> Account:
        """Returns whose key is in the header ``Authorization``.

        Raises:
            KeyRefused: 401, there is none, or it is unknown.
        """
        self._refresh()
        name, key = read_authorization(headers.get("authorization", ""))
        digest = hash_key(key)
        found = None
        for account in self._accounts.values():  # all of them: the time tells nothing
            if hmac.compare_digest(account.record.sha256, digest):
                found = account
        if found is None or name not in ("", found.name):
            raise KeyRefused("unknown")
        return found

    def _look(self) -> tuple[int, ...]:
        if self.options.file is None:
            return ()
        try:
            found = os.stat(self.options.file)
        except OSError:
            return (0,)
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(self._read())
        except DiffusersError as err:
            logger.error("the keys stay those of before: %s", err)

    def _read(self) -> list[KeyRecord]:
        records: list[KeyRecord] = []
        if self.options.file is not None:
            records += read_keys(Path(self.options.file))
        if self.options.variable is not None:
            text = os.environ.get(self.options.variable)
            if not text:
                raise InvalidOption("variable", self.options.variable, "a variable that is set")
            records += read_pairs(text)
        return check_keys(records)

    def _take(self, records: list[KeyRecord]) -> None:
        """Keys that are as before keep what they have counted."""
        before = self._accounts
        self._accounts = {
            one.name: before[one.name]
            if one.name in before and before[one.name].record == one
            else Account(one, self.options)
            for one in records
        }


def read_authorization(value: str) -> tuple[str, str]:
    """Returns user, which may be empty, and key of ``Bearer KEY`` or ``Basic user:KEY``.

    Raises:
        KeyRefused: 401, it is neither.
    """
    scheme, _, rest = value.strip().partition(" ")
    rest = rest.strip()
    if not rest:
        raise KeyRefused("missing")
    if scheme.lower() == "bearer":
        return "", rest
    if scheme.lower() != "basic":
        raise KeyRefused("missing")
    try:
        user, separator, key = base64.b64decode(rest, validate=True).decode().partition(":")
    except ValueError as err:
        raise KeyRefused("unreadable") from err
    if not (separator and key):
        raise KeyRefused("missing")
    return user, key
