"""Texts inside PNG, JPEG and WebP files: written, and read without decoding pixels."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bentoml_diffusers.workflow.files import xmp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ImageFormat = Literal["png", "jpeg", "webp"]

PREFIX = "diffusers_"
KEY = f"{PREFIX}workflow"  # the JSON
BLOB_KEY = f"{PREFIX}blob_"  # and a sha256: 79 characters, the most that a PNG allows
MAX_TEXT_BYTES = 48 * 1024 * 1024  # all texts together; Pillow refuses a PNG with more than 64 MiB
_MAX_TEXTS = 5000  # PNG chunks with our texts
_MAX_CHUNKS = 10_000  # PNG chunks of any kind, and JPEG segments
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_PIECE = 256 * 1024  # characters; Pillow refuses a PNG with a compressed text above 1 MiB
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_MAX_EXIF = 65533
_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_FILLING = re.compile(rb"\xff+")
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1


class BrokenContainer(ValueError):
    """A file has none of the three formats, or its texts are broken or too large."""


def save_arguments(
    image_format: ImageFormat, texts: Mapping[str, str], infotext: str | None = None
) -> dict[str, Any]:
    """Returns arguments for Pillow's ``save`` that write texts into an image.

    Args:
        image_format: Format of the file.
        texts: Our texts by name; names are letters and ``_``.
        infotext: A1111's text, which goes where A1111 puts it. A JPEG holds at most about 32,000
            characters of it; a longer one is left out.
    """
    if image_format == "png":
        return {"pnginfo": _make_png_info(texts, infotext)}
    exif = _make_exif(infotext) if infotext is not None else b""
    packet = xmp.make_packet(texts) if texts else b""
    if image_format == "webp":
        return {"exif": exif, "xmp": packet}
    return {
        "exif": exif if len(exif) <= _MAX_EXIF else b"",
        "extra": xmp.make_segments(packet) if packet else b"",
    }


def read_texts(data: bytes, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, str]:
    """Returns our texts of an image by name, without decoding its pixels.

    Nothing inflates beyond ``max_bytes``. Of a truncated file the
    complete texts are returned.

    Raises:
        BrokenContainer: Not a PNG, JPEG or WebP; a text that is broken or too large.
    """
    try:
        if data.startswith(_PNG):
            return _read_png(data, max_bytes)
        if data.startswith(_JPEG):
            return xmp.read_segments(_jpeg_segments(data), max_bytes)
        if is_image(data):
            return _read_webp(data, max_bytes)
    except xmp.XmpError as err:
        raise BrokenContainer(str(err)) from err
    raise BrokenContainer("not a PNG, JPEG or WebP file")


def is_image(data: bytes) -> bool:
    """True if a file starts like a PNG, JPEG or WebP."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return data.startswith((_PNG, _JPEG)) or is_webp


def _make_png_info(texts: Mapping[str, str], infotext: str | None) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        for start in range(0, len(text), _PIECE):
            info.add_itxt(name, text[start : start + _PIECE], zip=True)
    if infotext is not None:
        info.add_text("parameters", infotext)  # iTXt if it is not Latin-1
    return info


def _make_exif(text: str) -> bytes:
    exif = Image.Exif()
    encoded = text.encode("utf-16-be", errors="replace")
    exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + encoded}
    return exif.tobytes()


def _read_png(data: bytes, room: int) -> dict[str, str]:
    pieces: dict[str, list[str]] = {}
    count = 0
    for kind, content in _png_chunks(data):
        keyword = content.partition(b"\0")[0].decode("latin-1")
        if kind not in _PNG_TEXTS or not keyword.startswith(PREFIX):
            continue
        text = _PNG_TEXTS[kind](content[len(keyword) + 1 :], room)
        room -= len(text)
        count += 1
        if count > _MAX_TEXTS:
            raise BrokenContainer(f"an image with more than {_MAX_TEXTS} texts")
        pieces.setdefault(keyword, []).append(text)
    return {keyword: "".join(texts) for keyword, texts in pieces.items()}


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(_PNG)
    for _ in _at_most("chunks"):
        if position + 12 > len(data):
            return
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            return
        kind = data[position + 4 : position + 8]
        if kind in _PNG_TEXTS:
            if (
                zlib.crc32(data[position + 4 : end - 4])
                != struct.unpack_from(">I", data, end - 4)[0]
            ):
                raise BrokenContainer(f"a PNG whose {kind.decode()} chunk is damaged")
            yield kind, data[position + 8 : end - 4]
        position = end


def _read_text(content: bytes, room: int) -> str:
    return _bounded(content, room).decode("latin-1")


def _read_compressed_text(content: bytes, room: int) -> str:
    return _inflate(content[1:], room).decode("latin-1")


def _read_international_text(content: bytes, room: int) -> str:
    _language, _, rest = content[2:].partition(b"\0")
    text = rest.partition(b"\0")[2]
    try:
        return (_inflate(text, room) if content[:1] == b"\1" else _bounded(text, room)).decode()
    except UnicodeDecodeError as err:
        raise BrokenContainer("an iTXt chunk that is not UTF-8") from err


_PNG_TEXTS = {
    b"tEXt": _read_text,
    b"zTXt": _read_compressed_text,
    b"iTXt": _read_international_text,
}


def _bounded(text: bytes, room: int) -> bytes:
    if len(text) > room:
        raise BrokenContainer("an image with too much text")
    return text


def _inflate(data: bytes, room: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, room + 1)
    except zlib.error as err:
        raise BrokenContainer(f"a compressed text that is broken: {err}") from err
    _bounded(text, room)
    if not inflater.eof:
        raise BrokenContainer("a compressed text that is truncated")
    return text


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Yields the content of the APP1 segments before the pixels."""
    position = 2
    for _ in _at_most("segments"):
        filling = _FILLING.match(data, position)
        if not filling or filling.end() + 3 > len(data):
            return
        marker, position = data[filling.end()], filling.end() + 1
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        if marker not in _STANDALONE:
            (length,) = struct.unpack_from(">H", data, position)
            if marker == _APP1 and position + length <= len(data):
                yield data[position + 2 : position + length]
            position += length


def _read_webp(data: bytes, max_bytes: int) -> dict[str, str]:
    stream = io.BytesIO(data)
    stream.seek(12)
    for _ in _at_most("chunks"):
        header = stream.read(8)
        if len(header) < 8:
            return {}
        kind, length = struct.unpack("<4sI", header)
        if kind == b"XMP ":
            packet = stream.read(length)
            if len(packet) < length:
                return {}
            return xmp.read_packet(_bounded(packet, max_bytes))
        stream.seek(length + length % 2, io.SEEK_CUR)
    return {}


def _at_most(what: str) -> Iterator[int]:
    yield from range(_MAX_CHUNKS)
    raise BrokenContainer(f"an image with more than {_MAX_CHUNKS} {what}")
