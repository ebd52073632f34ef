"""XMP packets with our texts, and the JPEG segments that hold them.

Adobe's XMP specification, part 3 (storage in files): a packet of at most 65,502 bytes fits into
one segment of a JPEG; the rest goes into *extended XMP*, which the packet refers to by MD5.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING
from xml.parsers import expat
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_NAMESPACE = "urn:bentoml-diffusers:workflow/"
_EXTENSION_OF = "http://ns.adobe.com/xmp/note/"
_HAS_EXTENSION = "HasExtendedXMP"
_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENSION_HEADER = b"http://ns.adobe.com/xmp/extension/\0"
_MAX_SEGMENT = 65533  # bytes after the two of the length
_PART = 65400
_CHUNK = 64 * 1024  # characters that are parsed at once
_MAX_OTHER = 1024 * 1024  # characters beside our texts: parsed XML takes many times its size
_MAX_DEPTH = 32
_MAX_TEXTS = 5000
_MAX_ELEMENTS = 10_000  # and attributes
_MAX_ENTITY = 16  # characters of one that a chunk may cut
_MAX_PACKETS = 16  # per JPEG; usually one
_FIELDS = struct.Struct(">32sII")  # MD5 in hex, total length, offset of this part


class XmpError(ValueError):
    """A packet is broken or too large."""


def make_packet(texts: Mapping[str, str]) -> bytes:
    """Returns an XMP packet with texts by name; names are letters and ``_``."""
    properties = "".join(
        f"<diffusers:{name}>{escape(text)}</diffusers:{name}>" for name, text in texts.items()
    )
    return _wrap(f'xmlns:diffusers="{_NAMESPACE}"', properties)


def make_segments(packet: bytes) -> bytes:
    """Returns the APP1 segments of a JPEG that hold a packet of any size."""
    if len(_HEADER) + len(packet) <= _MAX_SEGMENT:
        return _make_segment(_HEADER + packet)
    digest = hashlib.md5(packet, usedforsecurity=False).hexdigest().upper()
    note = f'xmlns:xmpNote="{_EXTENSION_OF}" xmpNote:{_HAS_EXTENSION}="{digest}"'
    segments = [_make_segment(_HEADER + _wrap(note, ""))]
    for offset in range(0, len(packet), _PART):
        fields = _FIELDS.pack(digest.encode(), len(packet), offset)
        part = packet[offset : offset + _PART]
        segments.append(_make_segment(_EXTENSION_HEADER + fields + part))
    return b"".join(segments)


def read_segments(segments: Iterable[bytes], max_bytes: int) -> dict[str, str]:
    """Returns our texts from the APP1 segments of a JPEG, given without marker and length.

    Raises:
        XmpError: Broken, incomplete, or more than ``max_bytes``.
    """
    found = list(segments)
    packets = [segment[len(_HEADER) :] for segment in found if segment.startswith(_HEADER)]
    if len(packets) > _MAX_PACKETS:
        raise XmpError(f"an image with more than {_MAX_PACKETS} XMP packets")
    texts: dict[str, str] = {}
    for packet in packets:
        texts |= read_packet(packet)
    digest = texts.pop(_HAS_EXTENSION, None)
    if digest is not None:
        texts |= read_packet(_join_extension(found, digest, max_bytes))
    texts.pop(_HAS_EXTENSION, None)
    return texts


def read_packet(packet: bytes) -> dict[str, str]:
    """Returns our texts from a packet, by name.

    Raises:
        XmpError: Not XML, too much of it, or with a document type, which XMP never has.
    """
    texts: dict[str, list[str]] = {}
    open_names: list[str | None] = []
    n_elements = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal n_elements
        n_elements += 1 + len(attributes)
        if n_elements > _MAX_ELEMENTS:
            raise XmpError(f"XMP with more than {_MAX_ELEMENTS} elements")
        open_names.append(_own_name(tag))
        for key, value in attributes.items():
            if name := _own_name(key):
                texts[name] = [value]
        if name := open_names[-1]:
            texts[name] = []
        if len(open_names) > _MAX_DEPTH or len(texts) > _MAX_TEXTS:
            raise XmpError(f"XMP deeper than {_MAX_DEPTH}, or with more than {_MAX_TEXTS} texts")

    def read(data: str) -> None:
        if open_names and (name := open_names[-1]):
            texts[name].append(data)

    def refuse(*_: object) -> None:
        raise XmpError("XMP with a document type")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True  # one call for all text, not one per line and entity
    parser.StartElementHandler, parser.CharacterDataHandler = start, read
    parser.EndElementHandler = lambda _: open_names.pop()
    parser.StartDoctypeDeclHandler = refuse
    try:
        _feed(parser, packet.decode().rstrip("\0"), lambda: bool(open_names and open_names[-1]))
    except (expat.ExpatError, UnicodeDecodeError) as err:
        raise XmpError(f"XMP that is not valid XML: {err}") from err
    return {name: "".join(parts) for name, parts in texts.items()}


def _feed(parser: expat.XMLParserType, text: str, is_own: Callable[[], bool]) -> None:
    others = fed = 0
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        parser.Parse(chunk, False)
        fed += len(chunk.encode())
        is_in_tag = fed - parser.CurrentByteIndex > _MAX_ENTITY
        others += len(chunk) if is_in_tag or not is_own() else 0
        if others > _MAX_OTHER:
            raise XmpError(f"XMP with more than {_MAX_OTHER} characters of other programs")
    parser.Parse("", True)


def _own_name(name: str) -> str | None:
    namespace, _, local = name.rpartition("}")
    is_note = namespace == _EXTENSION_OF and local == _HAS_EXTENSION
    return local if is_note or namespace == _NAMESPACE else None


def _join_extension(segments: Iterable[bytes], digest: str, max_bytes: int) -> bytes:
    joined = bytearray()
    total = 0
    for length, offset, part in sorted(_read_parts(segments, digest)):
        if length > max_bytes:
            raise XmpError(f"{length} bytes of extended XMP, expected at most {max_bytes}")
        if offset != len(joined):
            raise XmpError(f"extended XMP has a gap at byte {len(joined)}")
        joined += part
        total = length
    if not total or len(joined) != total:
        raise XmpError(f"extended XMP ends at byte {len(joined)} of {total}")
    return bytes(joined)


def _read_parts(segments: Iterable[bytes], digest: str) -> Iterator[tuple[int, int, bytes]]:
    head = len(_EXTENSION_HEADER)
    for segment in segments:
        if segment.startswith(_EXTENSION_HEADER) and len(segment) >= head + _FIELDS.size:
            owner, length, offset = _FIELDS.unpack_from(segment, head)
            if owner == digest.encode():
                yield length, offset, segment[head + _FIELDS.size :]


def _make_segment(data: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


def _wrap(attributes: str, content: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {attributes}>{content}</rdf:Description>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()
