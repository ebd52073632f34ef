"""Puts files of a source into an entry of the store, without a second copy where that is safe.

What is stored must not change when the source is edited later. So a file is, in this order,

1. cloned, where the file system shares blocks but not the inode (btrfs, XFS, bcachefs, APFS),
2. hard linked, where nobody edits it in place: files of the hub's cache, which are named by
   their hash, and files whose write permission is removed here,
3. copied: small files, which editors rewrite in place; files on another disk or of another
   owner; and everything where permissions are not enforced, as for root.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Literal

from bentoml_diffusers.errors import DiffusersError, StorageFull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

LinkMode = Literal["auto", "hard", "copy"]
SMALL_BYTES = 64 * 1024

_FICLONE = 0x40049409  # linux/fs.h
_CAN_WRITE = 0o222
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Linker:
    """Puts files into one entry, and keeps track of how.

    Args:
        mode: ``"auto"`` as above; ``"hard"`` links also where the source can be edited in place
            (the store then notices a change, and refuses the model); ``"copy"`` copies.
    """

    def __init__(self, mode: LinkMode = "auto") -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self.linked: set[str] = set()
        self._inodes: set[tuple[int, int]] = set()
        self._protected: list[tuple[Path, int]] = []
        self._can_clone = mode != "copy"

    def place(self, source: Path, target: Path, name: str, *, is_frozen: bool = False) -> None:
        """Makes ``target`` hold what ``source`` holds.

        Args:
            source: A file, links resolved.
            target: Where to put it; its folder is created.
            name: Path of the file inside the model.
            is_frozen: True if the source's files are only ever replaced, never edited in place.

        Raises:
            StorageFull: 507, no space for a copy.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        is_small = source.stat().st_size < SMALL_BYTES
        if not is_small and self._clone(source, target):
            way = "cloned"
        elif not is_small and self._hard_link(source, target, is_frozen):
            way = "linked"
            self.linked.add(name)
        else:
            with storage_errors(name):
                shutil.copyfile(source, target)
            way = "small" if is_small else "copied"
        self.counts[way] += 1

    def log(self, tag: object) -> None:
        """Logs once whether the large files were copied or linked."""
        if self.counts["copied"] and self.mode != "copy":
            logger.info(
                "%s: copied %d large files: they are on another disk, or could be edited in place",
                tag,
                self.counts["copied"],
            )
        if self._protected:
            logger.info(
                "%s: linked %d files of the source and made them read-only", tag, len(self.linked)
            )

    def undo(self) -> None:
        """Restores the write permission of the source's files, after a failed import."""
        for path, mode in self._protected:
            with contextlib.suppress(OSError):
                path.chmod(mode)

    def _clone(self, source: Path, target: Path) -> bool:
        if not self._can_clone:
            return False
        self._can_clone = clone_file(source, target)
        return self._can_clone

    def _hard_link(self, source: Path, target: Path, is_frozen: bool) -> bool:
        stat = source.stat()
        inode = (stat.st_dev, stat.st_ino)
        # Twice the same inode in one model would become a link inside its exported archive.
        if self.mode == "copy" or inode in self._inodes:
            return False
        if stat.st_dev != target.parent.stat().st_dev:
            return False
        if not (is_frozen or self.mode == "hard" or self._protect(source)):
            return False
        try:
            os.link(source, target)
        except OSError:  # no links on this file system, too many of them, or not allowed
            return False
        self._inodes.add(inode)
        return True

    def _protect(self, path: Path) -> bool:
        """Removes the write permission; False where that would not be enforced."""
        mode = path.stat().st_mode
        try:
            path.chmod(mode & ~_CAN_WRITE)
        except OSError:
            return False
        by_effective_user = os.access in os.supports_effective_ids
        if os.access(path, os.W_OK, effective_ids=by_effective_user):
            path.chmod(mode)
            return False
        if mode & _CAN_WRITE:
            self._protected.append((path, mode))
        return True


def clone_file(source: Path, target: Path) -> bool:
    """Makes a copy-on-write clone; False if the file system cannot."""
    try:
        import fcntl

        with source.open("rb") as read, target.open("wb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    except (ImportError, OSError):
        target.unlink(missing_ok=True)
        return False
    return True


@contextlib.contextmanager
def storage_errors(what: object) -> Iterator[None]:
    """Turns "no space left on device" into :class:`StorageFull`.

    Raises:
        StorageFull: 507, a disk or a quota is full.
    """
    try:
        yield
    except DiffusersError:
        raise
    except Exception as err:
        # safetensors raises an error of its own, which has the number in its text only.
        if getattr(err, "errno", None) in _FULL or "(os error 28)" in str(err):
            raise StorageFull(what) from err
        raise
