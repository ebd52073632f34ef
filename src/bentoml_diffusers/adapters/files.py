"""Reads, hashes and downloads the files of adapters."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from bentoml_diffusers.adapters.sources import Adapter


class FileKey(NamedTuple):
    """Identifies the content of an adapter's file.

    Attributes:
        place: Its path, and the loader's arguments.
        state: Device, inode, mtime, ctime and size of the file. Inode and ctime also change when
            `cp -p` or `rsync -t` replaces the file.
    """

    place: tuple[object, ...]
    state: tuple[int, ...] = ()


def extend_key(key: object, part: str) -> object:
    """Returns the key of something derived from the content of ``key``."""
    return key._replace(place=(*key.place, part)) if isinstance(key, FileKey) else (key, part)


def list_outdated(keys: Iterable[object], new: object) -> list[object]:
    """Returns those keys that belong to earlier versions of the ``new`` key's file."""
    return [
        key
        for key in keys
        if isinstance(key, FileKey)
        and isinstance(new, FileKey)
        and key.place == new.place
        and key != new
    ]


def file_key(adapter: Adapter) -> FileKey:
    """Returns the key of an adapter's content; costs a ``stat``."""
    arguments = tuple(sorted((key, repr(value)) for key, value in adapter.arguments.items()))
    place = (adapter.path, *arguments, *adapter.components)
    try:
        found = os.stat(adapter.path)
        if stat.S_ISDIR(found.st_mode):
            found = os.stat(Path(adapter.path) / _weight_name(adapter))
    except OSError:
        return FileKey(place)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return FileKey(place, (found.st_dev, found.st_ino, *times, found.st_size))


def _weight_name(adapter: Adapter) -> str:
    return str(adapter.arguments.get("weight_name", "pytorch_lora_weights.safetensors"))


def hash_adapter(adapter: Adapter) -> str:
    """Returns the sha256 of an adapter's file; an unchanged file is read only once.

    Raises:
        InvalidModel: 400, there is none.
    """
    return _hash_once(local_file(adapter), file_key(adapter))


@functools.lru_cache(maxsize=1024)
def _hash_once(path: Path, _key: object) -> str:
    return hash_file(path)


def local_file(adapter: Adapter) -> Path:
    """Returns the file of an adapter, downloaded if the operator allowed the hub.

    Raises:
        InvalidModel: 400, there is none.
    """
    path = Path(adapter.path)
    if path.is_file():
        return path
    # A folder, or a repository of the hub if the operator allowed that.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    weight_name = _weight_name(adapter)
    if path.is_dir():
        return path / weight_name
    revision = adapter.arguments.get("revision")
    try:
        return Path(hf_hub_download(adapter.path, weight_name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as err:
        raise InvalidModel(
            adapter.name, f"could not be downloaded: {type(err).__name__}", "check its weight_name"
        ) from err


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file.

    Attributes:
        tensors: Its tensors, which share no memory with the file.
        about: Its metadata.
        is_finite: No number in it is NaN or infinite.
    """

    tensors: dict[str, torch.Tensor]
    about: dict[str, str]
    is_finite: bool


def read_tensors(name: str, path: Path) -> TensorFile:
    """Reads a safetensors file.

    Raises:
        InvalidModel: 400, the file is broken or gone.
    """
    from safetensors.torch import load

    with _broken(name, path):
        content = bytearray(path.stat().st_size)
        with path.open("rb") as opened:
            opened.readinto(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size]) if size < len(content) else {}
        about = {key: str(value) for key, value in header.pop("__metadata__", {}).items()}
        about.pop("format", None)
        found = _views(header, content, 8 + size)
        if found is not None:
            return TensorFile(found[0], about, found[1])
        tensors = {key: _widened(tensor) for key, tensor in load(bytes(content)).items()}
        return TensorFile(tensors, about, all(is_finite(one) for one in tensors.values()))


def _views(
    header: dict[str, Any], content: bytearray, start: int
) -> tuple[dict[str, torch.Tensor], bool] | None:
    """Returns tensors that are views of the file's bytes, and whether they are finite.

    Takes a fifth of the time of copies. ``None`` for anything unusual, which safetensors itself
    then reads or refuses.
    """
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    dtype = dtypes.get(entries[0][1]["dtype"]) if entries else None
    if dtype is None or start % dtype.itemsize:
        return None
    sizes, expected = [], 0
    for _, entry in entries:
        low, high = entry["data_offsets"]
        sizes.append(math.prod(entry["shape"]))
        is_usual = dtypes.get(entry["dtype"]) == dtype and low == expected
        if not is_usual or high - low != sizes[-1] * dtype.itemsize:
            return None
        expected = high
    if start + expected != len(content):
        return None
    whole = torch.frombuffer(content, dtype=dtype, offset=start)
    parts = zip(entries, whole.split_with_sizes(sizes), strict=True)
    tensors = {key: part.view(entry["shape"]) for (key, entry), part in parts}
    return tensors, is_finite(whole)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Widens 8-bit numbers to bfloat16, which is exact: diffusers multiplies some of them."""
    import torch

    is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.to(torch.bfloat16) if is_narrow else tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """True if no number of the tensor is NaN or infinite."""
    import torch

    # NaN and infinity survive a sum, which is 20 times as fast as testing each number; a sum that
    # overflowed is tested number by number.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


@contextlib.contextmanager
def _broken(name: str, path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        reason = str(err).replace(str(path), name)[:300]
        raise InvalidModel(name, f"is broken or truncated: {reason}") from err
