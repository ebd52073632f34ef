"""Text and blobs of a workflow as files: in a folder, a zip, or a hub repository."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel, InvalidWorkflow, ModelNotFound
from bentoml_diffusers.media import UnreadableMedia, find_container, read_text
from bentoml_diffusers.store import download_file, storage_errors, upload_files
from bentoml_diffusers.workflow.files import containers
from bentoml_diffusers.workflow.files.blobs import FOLDER, decode_base64
from bentoml_diffusers.workflow.files.bounds import LOCAL
from bentoml_diffusers.workflow.files.suffixes import RESULT_SUFFIXES

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from bentoml_diffusers.workflow.files.bounds import Bounds

FILENAME = "diffusion_workflow.json"
_SUFFIXES = (".json", ".zip", *RESULT_SUFFIXES)
# Other methods inflate everything at once.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP = b"PK\x03\x04"
_ZIP_ENTRY = b"PK\x01\x02"
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError)


def _nothing(_name: str) -> bytes | None:
    return None


@dataclass(frozen=True)
class Bundle:
    """A workflow in parts.

    Attributes:
        text: Its JSON; blobs may be in it as base64.
        read: Returns the blob of a file name, ``None`` if there is none.
    """

    text: bytes
    read: Callable[[str], bytes | None] = _nothing


def open_bundle(
    source: str | os.PathLike[str], filename: str, *, revision: str, token: str | None
) -> Bundle:
    """Opens a workflow: a folder, a file, or a hub repository.

    Raises:
        InvalidWorkflow: 400, a zip that is broken.
        ModelNotFound: 404, no such file, folder or repository.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    path = Path(source).expanduser()
    is_file_name = path.suffix.lower() in _SUFFIXES
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not is_file_name
    if is_repository and not path.exists():
        return _open_repository(str(source), _checked(filename), revision, token)
    path = path / _checked(filename) if path.is_dir() else path
    if not path.is_file():
        raise ModelNotFound.no_workflow(path.name)

    def read(name: str) -> bytes | None:
        blob = path.parent / FOLDER / name
        return blob.read_bytes() if blob.is_file() else None

    bundle = read_bundle(path.read_bytes(), LOCAL)
    return replace(bundle, read=read) if bundle.read is _nothing else bundle


def push_bundle(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    message: str,
) -> None:
    """Uploads the files that :func:`write_bundle` wrote.

    Raises:
        ModelNotFound: 404, no such repository, or the token may not write to it.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    upload_files(repo_id, files, token=token, private=private, message=message)


def _open_repository(repo_id: str, filename: str, revision: str, token: str | None) -> Bundle:
    def read(name: str) -> bytes | None:
        try:
            path = download_file(repo_id, f"{FOLDER}/{name}", revision=revision, token=token)
        except InvalidModel:
            return None
        return path.read_bytes()

    data = download_file(repo_id, filename, revision=revision, token=token).read_bytes()
    bundle = read_bundle(data, LOCAL)
    return replace(bundle, read=read) if bundle.read is _nothing else bundle


def read_bundle(data: bytes, bounds: Bounds) -> Bundle:
    """Opens a workflow from memory: an image, video or audio file, a zip, else JSON.

    Raises:
        InvalidWorkflow: 400, broken, with unexpected files, or beyond the bounds.
    """
    if containers.is_image(data):
        return _read_image(data, bounds)
    if find_container(data) is not None:
        return _read_media(data, bounds)
    if not data.startswith(_ZIP):
        return Bundle(data)
    if data.count(_ZIP_ENTRY) > 2 * (
        bounds.max_blobs + 1
    ):  # checked before the entries become objects
        raise InvalidWorkflow("workflow", "a zip with more files", f"at most {bounds.max_blobs}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = {item.filename: item for item in archive.infolist()}
    except _BROKEN_ZIP as err:
        raise _broken_zip(err) from err
    _check_members(members, bounds)

    def read(name: str) -> bytes | None:
        return _read_member(archive, members[name]) if name in members else None

    text = read(next(name for name in members if "/" not in name))
    return Bundle(text or b"", lambda name: read(f"{FOLDER}/{name}"))


def _read_member(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(item) as stream:
            data = stream.read(item.file_size + 1)  # without a size it inflates everything
    except _BROKEN_ZIP as err:
        raise _broken_zip(err) from err
    if len(data) != item.file_size:
        raise _broken_zip(EOFError(f"{item.filename} has another size than its header says"))
    return data


def _read_image(data: bytes, bounds: Bounds) -> Bundle:
    try:
        room = min(bounds.max_file_bytes, containers.MAX_TEXT_BYTES)
        texts = containers.read_texts(data, room)
    except containers.BrokenContainer as err:
        raise InvalidWorkflow("workflow", str(err), "an image that holds one") from err
    if containers.KEY not in texts:
        raise InvalidWorkflow("workflow", "an image without one", "an image that holds one")

    def read(name: str) -> bytes | None:
        key = f"{containers.BLOB_KEY}{name.partition('.')[0]}"
        return decode_base64(f"workflow.{key}", texts[key]) if key in texts else None

    return Bundle(texts[containers.KEY].encode(), read)


def _read_media(data: bytes, bounds: Bounds) -> Bundle:
    try:
        text = read_text(data)
    except UnreadableMedia as err:
        raise InvalidWorkflow("workflow", str(err), "a file that holds one") from err
    if text is None:
        raise InvalidWorkflow("workflow", "a file without one", "a file that holds one")
    if len(text) > bounds.max_file_bytes:
        raise InvalidWorkflow("workflow", f"{len(text)} bytes", f"{bounds.max_file_bytes} at most")
    return Bundle(text.encode())


def _broken_zip(error: Exception) -> InvalidWorkflow:
    return InvalidWorkflow("workflow", f"a broken zip: {error}", "a complete zip")


def write_bundle(
    folder: str | os.PathLike[str], filename: str, text: str, blobs: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Writes a workflow into a folder, the text last, so that readers of it find its blobs.

    Returns:
        All files, by path relative to the folder.

    Raises:
        InvalidWorkflow: 400, an invalid file name.
        StorageFull: 507, no space left.
    """
    root = Path(folder).expanduser()
    beside = {f"{FOLDER}/{name}": data for name, data in blobs.items()}
    is_zip = _checked(filename).endswith(".zip")
    files = {**beside, FILENAME if is_zip else filename: text.encode()}
    if is_zip:
        files = {filename: _pack(files)}
    with storage_errors(filename):
        for name, data in files.items():
            _write(root / name, data)
    return files


def _pack(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            item = zipfile.ZipInfo(name)  # with a fixed date: equal workflows make equal files
            item.compress_type = zipfile.ZIP_STORED if "/" in name else zipfile.ZIP_DEFLATED
            archive.writestr(item, data)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)


def _check_members(members: Mapping[str, zipfile.ZipInfo], bounds: Bounds) -> None:
    names = [name for name in members if "/" not in name]
    others = [name for name in members if "/" in name and Path(name).parts[0] != FOLDER]
    if len(names) != 1 or others:
        raise InvalidWorkflow("workflow", list(members), f"one JSON file, and {FOLDER}/ beside it")
    if any(item.compress_type not in _COMPRESSIONS for item in members.values()):
        raise InvalidWorkflow("workflow", "a zip compressed otherwise", "files stored or deflated")
    size = sum(item.file_size for item in members.values())
    limit = bounds.max_json_bytes + bounds.max_blob_bytes
    if size > limit or len(members) > bounds.max_blobs + 1:
        raise InvalidWorkflow(
            "workflow",
            f"a zip of {len(members)} files with {size} bytes",
            f"at most {bounds.max_blobs} blobs, and {limit} bytes",
        )


def _checked(filename: str) -> str:
    is_name = Path(filename).name == filename and "\\" not in filename
    if not is_name or not filename.endswith((".json", ".zip")):
        raise InvalidWorkflow("filename", filename, "the name of a .json or .zip file")
    return filename
