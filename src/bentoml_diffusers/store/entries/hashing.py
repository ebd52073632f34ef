"""Hashes of stored files: at once where that is quick, else in a thread beside the caller.

Links are made in milliseconds, while sha256 reads every byte. So large files are
hashed after the import; until then size and modification time stand in for the hash.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries.record import Record, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

EAGER_BYTES = 64 << 20  # hashed in a fraction of a second

_threads: dict[Path, threading.Thread] = {}


def hash_file(path: Path) -> str:
    """Returns the sha256 of one file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """Returns the sha256 of a file with this text."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below ``folder``, by relative path."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in list_files(folder)}


def list_files(folder: Path) -> list[Path]:
    """Returns all files below ``folder``, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_tree(files: Mapping[str, str]) -> str:
    """Returns one hash over paths and their hashes; only equal trees have equal hashes."""
    lines = "".join(f"{path}\0{digest}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Returns size, modification time in nanoseconds, and inode of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def with_hashes(record: Record, root: Path, known: Mapping[str, str], linked: set[str]) -> Record:
    """Returns the record with hashes of the small files below ``root``, and stamps of the rest.

    Args:
        record: Of the entry that is being written.
        root: Folder of the pipeline or adapter.
        known: Hashes that are known already, by path.
        linked: Paths of the files that share their inode with the source.
    """
    paths = {path.relative_to(root).as_posix(): path for path in list_files(root)}
    unknown = {name: path for name, path in paths.items() if name not in known}
    is_quick = sum(path.stat().st_size for path in unknown.values()) <= EAGER_BYTES
    files = {name: digest for name, digest in known.items() if name in paths}
    for name, path in unknown.items():
        if is_quick or path.stat().st_size <= 1 << 20:
            files[name] = hash_file(path)
    stamps = {
        name: stamp(path) for name, path in paths.items() if name in linked or name not in files
    }
    tree = hash_tree(files) if len(files) == len(paths) else None
    return replace(record, files=files, stamps=stamps, tree=tree)


def hash_rest_later(entry: Path, record: Record) -> None:
    """Starts a thread that adds missing hashes to a stored record; Python waits for it at exit."""
    if record.tree is not None:
        return
    thread = threading.Thread(target=_complete_quietly, args=(entry,), name="diffusers-hashes")
    _threads[entry] = thread
    thread.start()


def complete_record(entry: Path) -> Record | None:
    """Returns the record of a stored model with all hashes; computes the missing ones.

    Raises:
        InvalidModel: 400, a file changed before its hash was taken.
    """
    thread = _threads.get(entry)
    if thread is not None and thread is not threading.current_thread():
        thread.join()
    record = read_record(entry)
    if record is None or record.tree is not None:
        return record
    root = entry / record.folder
    check_stamps(entry.name, root, record.stamps)
    missing = [name for name in record.stamps if name not in record.files]
    files = {**record.files, **{name: hash_file(root / name) for name in missing}}
    done = replace(record, files=files, tree=hash_tree(files))
    if missing:
        done.write(entry)
    return done


def check_stamps(
    name: str,
    root: Path,
    stamps: Mapping[str, Sequence[int]],
    files: Mapping[str, str] | None = None,
) -> None:
    """Refuses files that were edited in place since the import; costs one ``stat`` each.

    A file with a new modification time and the same content passes; that takes one hash.

    Raises:
        InvalidModel: 400, a file is gone or was changed.
    """
    for path, expected in stamps.items():
        try:
            now = stamp(root / path)
        except FileNotFoundError as err:
            raise InvalidModel(name, f"lacks {path}", "import it again") from err
        if _is_unchanged(now, expected):
            continue
        known = (files or {}).get(path)
        if now[0] != expected[0] or known is None or hash_file(root / path) != known:
            raise InvalidModel(
                name, f"was changed in place after its import: {path}", "import it again"
            )


def _is_unchanged(now: Sequence[int], expected: Sequence[int]) -> bool:
    size, changed, inode = expected
    # Another inode: the model was exported and imported, which keeps no modification times.
    return now[0] == size and (now[2] != inode or now[1] == changed)


def _complete_quietly(entry: Path) -> None:
    try:
        complete_record(entry)
    except (OSError, InvalidModel) as err:  # deleted meanwhile, or changed: `verify` says so
        logger.debug("could not hash %s: %s", entry, err)
    finally:
        _threads.pop(entry, None)
