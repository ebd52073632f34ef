"""The images of jobs, in a folder or an object store, and addresses that expire."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Mapping


class Results:
    """Files below a folder or URL. Blocks; for threads beside an event loop.

    Args:
        url: A folder, or a URL for fsspec.

    Raises:
        InvalidOption: 400, a place that cannot be used.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            self._files, self._root = url_to_fs(url)
            self._files.makedirs(self._root, exist_ok=True)
        except (ImportError, ValueError, OSError) as err:
            raise InvalidOption("results", url, f"a place that can be written to: {err}") from err

    def write(self, job_id: str, name: str, data: bytes) -> None:
        """Writes a file of a job; whole, since nobody reads it before its job has ended."""
        self._files.makedirs(f"{self._root}/{job_id}", exist_ok=True)
        self._files.pipe_file(f"{self._root}/{job_id}/{name}", data)

    def read(self, job_id: str, name: str) -> bytes | None:
        """Returns a file; ``None`` if it is gone."""
        try:
            data: bytes = self._files.cat_file(f"{self._root}/{job_id}/{name}")
        except FileNotFoundError:
            return None
        return data

    def delete(self, job_id: str) -> None:
        """Deletes all files of a job."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{job_id}", recursive=True)


def sign(path: str, secret: str, lifetime_s: float) -> str:
    """Returns a path with a query that is good for some time (HMAC with SHA-256)."""
    expires = str(int(time.time() + lifetime_s))
    return f"{path}?{urlencode({'expires': expires, 'signature': _mac(path, expires, secret)})}"


def is_signed(path: str, query: Mapping[str, str], secret: str) -> bool:
    """True for a path that :func:`sign` returned, and whose time is not over."""
    expires = query.get("expires", "")
    good = hmac.compare_digest(_mac(path, expires, secret), query.get("signature", ""))
    return good and expires.isdecimal() and int(expires) > time.time()


def _mac(path: str, expires: str, secret: str) -> str:
    return hmac.new(secret.encode(), f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()
