"""Texts of video and audio files, read without decoding them. The files may be untrusted."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.media.encoders import import_av
from bentoml_diffusers.media.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EBML = b"\x1a\x45\xdf\xa3"
_WAVE = b"RIFF", b"WAVE"
# FFmpeg reads no further than this to find out what a stream is, and nothing but what it is given.
SAFE_OPTIONS: Mapping[str, str] = {
    "protocol_whitelist": "none",
    "probesize": str(1 << 20),
    "analyzeduration": "0",
}


class UnreadableMedia(ValueError):
    """A file is not one of the known containers, or broken."""


def find_container(data: bytes) -> str | None:
    """Returns FFmpeg's name of the demuxer for a file, by its first bytes; ``None`` for others.

    Playlists and lists of files, which lead to other files, are among the others.
    """
    head = data[:12]
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(_EBML):
        return "matroska"
    if (head[:4], head[8:12]) == _WAVE:
        return "wav"
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"OggS"):
        return "ogg"
    is_mp3 = head.startswith(b"ID3") or (head[:1] == b"\xff" and head[1:2] in _MP3_HEADERS)
    return "mp3" if is_mp3 else None


_MP3_HEADERS = (b"\xfb", b"\xf3", b"\xf2", b"\xfa")


def read_text(data: bytes) -> str | None:
    """Returns the workflow that :func:`write_media` put into a file; ``None`` without one.

    Raises:
        UnreadableMedia: Not a known container, or broken.
        CodecMissing: 501, PyAV is not installed.
    """
    av = import_av()
    container = find_container(data)
    if container is None:
        raise UnreadableMedia("not a known video or audio file")
    keys = {found.text_key.lower() for found in FORMATS.values()}
    try:
        with av.open(io.BytesIO(data), format=container, options=dict(SAFE_OPTIONS)) as file:
            texts = dict(_list_texts(file))
    except (av.FFmpegError, ValueError, UnicodeDecodeError) as err:
        raise UnreadableMedia("a broken video or audio file") from err
    return next((texts[key] for key in sorted(keys, reverse=True) if key in texts), None)


def _list_texts(file: Any) -> Iterator[tuple[str, str]]:
    """Matroska has names in capitals, Ogg has the texts at its streams."""
    for stream in file.streams:
        yield from ((name.lower(), text) for name, text in stream.metadata.items())
    yield from ((name.lower(), text) for name, text in file.metadata.items())
