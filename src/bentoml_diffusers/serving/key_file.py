"""API keys as they are stored: a file of JSON, or pairs in an environment variable.

Only the SHA-256 of a key is stored. A key is 256 random bits, so nobody finds it by trying, and a
slow hash, which is made for passwords that people choose, would cost each request what it protects
from nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.tasks.request_options import MAX_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

PREFIX = "bd-"  # by which scanners of repositories and logs can know a key
DEFAULT_FILE = "diffusers-keys.json"  # in BENTOML_HOME
_FORMAT = 1
_MIN_CHARS = 32  # of a key that an operator brings along
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_INTEGERS = ("requests_per_minute", "pixel_steps_per_minute", "max_running")


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """What is stored of a key; a limit that is ``None`` is that of :class:`KeyOptions`.

    Attributes:
        name: Whose it is: letters, digits, ``.``, ``_`` and ``-``; a label of the metrics.
        sha256: Hash of the key, in hexadecimal.
        created: When it was made, in UTC.
        tasks: What it may ask for; none: all tasks.
        requests_per_minute: Requests to start in a minute.
        pixel_steps_per_minute: Pixels times images times steps in a minute.
        max_running: Requests at once, those that wait included.
        priority: Of its requests, from -8 to 8: each level doubles its share of the device.
    """

    name: str
    sha256: str
    created: str = ""
    tasks: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    pixel_steps_per_minute: int | None = None
    max_running: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise InvalidOption("name", self.name, "1 to 64 letters, digits, '.', '_' or '-'")
        if not (isinstance(self.sha256, str) and _HASH.fullmatch(self.sha256)):
            raise InvalidOption("sha256", self.sha256, "64 hexadecimal digits")
        tasks: object = self.tasks
        if not isinstance(tasks, (list, tuple)) or not all(isinstance(one, str) for one in tasks):
            raise InvalidOption("tasks", tasks, "a list of names of tasks")
        object.__setattr__(self, "tasks", tuple(tasks))
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and value >= 1):
                raise InvalidOption(name, value, "an integer from 1")
        if not (_is_integer(self.priority) and -MAX_PRIORITY <= self.priority <= MAX_PRIORITY):
            raise InvalidOption(
                "priority", self.priority, f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            )


def hash_key(key: str) -> str:
    """Returns the hash of a key that is stored and compared."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def make_key() -> str:
    """Returns a new key."""
    return PREFIX + secrets.token_urlsafe(32)


def default_path() -> Path:
    """Returns the file of the commands where none is named."""
    from bentoml_diffusers import _compat

    return _compat.model_store().root.parent / DEFAULT_FILE


def read_keys(path: Path) -> list[KeyRecord]:
    """Reads a file of keys.

    Raises:
        InvalidOption: 400, the file is missing, or is not one of keys.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not JSON"
        raise InvalidOption(
            "keys", str(path), f"a file of `bentoml diffusers key add`: {reason}"
        ) from err
    if not isinstance(document, dict) or document.get("version") != _FORMAT:
        raise InvalidOption("keys", str(path), f"a file of keys of version {_FORMAT}")
    entries = document.get("keys")
    if not isinstance(entries, list):
        raise InvalidOption("keys", str(path), "a list under 'keys'")
    return check_keys([_read_record(entry, path) for entry in entries])


def _read_record(entry: Any, path: Path) -> KeyRecord:
    known = {item.name for item in fields(KeyRecord)}
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= known:
        raise InvalidOption("keys", str(path), f"keys with fields of {', '.join(sorted(known))}")
    return KeyRecord(**entry)


def read_pairs(text: str) -> list[KeyRecord]:
    """Reads ``alice=KEY, bob=sha256:HASH``, as an environment variable holds it.

    Raises:
        InvalidOption: 400, something else; the text, which may hold keys, is not in the error.
    """
    records = []
    for number, pair in enumerate(re.split(r"[,\s]+", text.strip()), 1):
        name, separator, value = pair.partition("=")
        is_hash = value.startswith("sha256:")
        if not separator or not (is_hash or len(value) >= _MIN_CHARS):
            expected = f"NAME=KEY of at least {_MIN_CHARS} characters, or NAME=sha256:HASH"
            raise InvalidOption("keys", f"pair {number}", expected)
        digest = value.removeprefix("sha256:") if is_hash else hash_key(value)
        records.append(KeyRecord(name=name, sha256=digest))
    return check_keys(records)


def check_keys(records: Sequence[KeyRecord]) -> list[KeyRecord]:
    """Returns the keys if each name is there once.

    Raises:
        InvalidOption: 400, a name of two keys.
    """
    names = [record.name for record in records]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidOption("keys", twice, "each name once")
    return list(records)


def add_key(path: Path, name: str, **limits: Any) -> str:
    """Makes a key, stores its hash, and returns it: nobody can read it again.

    Args:
        path: The file; made if it is not there.
        name: Whose it is.
        **limits: Fields of :class:`KeyRecord`.

    Raises:
        InvalidOption: 400, the name is taken, or a limit is wrong.
    """
    key = make_key()
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = KeyRecord(name=name, sha256=hash_key(key), created=created, **limits)
    with _changing(path) as records:
        if name in records:
            raise InvalidOption("name", name, "a name without a key; remove that one first")
        records[name] = record
    return key


def remove_key(path: Path, name: str) -> None:
    """Removes a key.

    Raises:
        InvalidOption: 400, there is no key of that name.
    """
    with _changing(path) as records:
        if name not in records:
            raise InvalidOption("name", name, f"one of {', '.join(records) or 'no keys'}")
        del records[name]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, KeyRecord]]:
    """Gives the keys to change; writes them at once, so that a reader has old or new ones."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", mode=0o600):
            records = {one.name: one for one in read_keys(path)} if path.exists() else {}
            yield records
            _write(path, records)
    except OSError as err:
        raise InvalidOption("file", str(path), f"a file to write to: {err.strerror}") from err


def _write(path: Path, records: Mapping[str, KeyRecord]) -> None:
    document = {"version": _FORMAT, "keys": [_plain(one) for one in records.values()]}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(record: KeyRecord) -> dict[str, Any]:
    values = asdict(record)
    return {name: value for name, value in values.items() if value not in (None, (), "", 0)}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
