"""The file formats of video and audio: container, codecs, suffix and media type of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

VideoFormat = Literal["mp4", "mp4-av1", "webm", "webp", "gif"]
AudioFormat = Literal["wav", "flac", "mp3", "opus"]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How frames or samples are encoded.

    Attributes:
        name: FFmpeg's name of the encoder.
        options: Of the encoder.
        rates: Sampling rates that it takes; empty for any.
        max_rate: The highest one, where any up to it is taken.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    rates: tuple[int, ...] = ()
    max_rate: int = 192_000


@dataclass(frozen=True, kw_only=True)
class Format:
    """A container with its codecs.

    Attributes:
        container: FFmpeg's name of the muxer.
        media_type: Of an HTTP answer.
        suffixes: Of files.
        video: Codec of the frames; none for audio.
        audio: Codec of the sound.
        file_options: Of the muxer, for a file.
        stream_options: Of the muxer, for a stream that nobody seeks in.
        can_stream: It needs no seeking; else it is sent when it is complete.
        text_key: Name of the text that holds a workflow.
        max_text_bytes: Of that text.
    """

    container: str
    media_type: str
    suffixes: tuple[str, ...]
    video: Codec | None = None
    audio: Codec
    file_options: Mapping[str, str] = field(default_factory=dict)
    stream_options: Mapping[str, str] = field(default_factory=dict)
    can_stream: bool = True
    text_key: str = "diffusers_workflow"
    max_text_bytes: int = 48 * 1024 * 1024


# crf: constant quality, close to what the eye can see; presets that a CPU keeps up with.
_H264 = Codec(name="libx264", options={"crf": "18", "preset": "fast"})
_AV1 = Codec(name="libsvtav1", options={"crf": "28", "preset": "8"})
_VP9 = Codec(
    name="libvpx-vp9",
    options={"crf": "28", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
)
_AAC = Codec(name="aac", options={"b": "192000"}, max_rate=96_000)
_OPUS = Codec(name="libopus", options={"b": "160000"}, rates=(48_000,))
_MP3 = Codec(
    name="libmp3lame",
    options={"b": "256000"},
    rates=(8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
)
# `use_metadata_tags` lets MP4 have texts of any name. A file has its index in front, a stream has
# an index for each fragment.
_MP4_FILE = {"movflags": "faststart+use_metadata_tags"}
_MP4_STREAM = {
    "movflags": "frag_keyframe+empty_moov+delay_moov+default_base_moof+use_metadata_tags"
}


def _mp4(codec: Codec, suffixes: tuple[str, ...]) -> Format:
    return Format(
        container="mp4",
        media_type="video/mp4",
        suffixes=suffixes,
        video=codec,
        audio=_AAC,
        file_options=_MP4_FILE,
        stream_options=_MP4_STREAM,
    )


FORMATS: Mapping[str, Format] = {
    "mp4": _mp4(_H264, (".mp4", ".m4v")),
    "mp4-av1": _mp4(_AV1, ()),
    "webm": Format(
        container="webm", media_type="video/webm", suffixes=(".webm",), video=_VP9, audio=_OPUS
    ),
    "wav": Format(
        container="wav",
        media_type="audio/wav",
        suffixes=(".wav",),
        audio=Codec(name="pcm_s16le"),
        can_stream=False,
        text_key="comment",  # RIFF has places for known names only
    ),
    "flac": Format(
        container="flac",
        media_type="audio/flac",
        suffixes=(".flac",),
        audio=Codec(name="flac"),
        can_stream=False,  # its length stands in front
        max_text_bytes=(1 << 24) - 4096,  # of a metadata block
    ),
    "mp3": Format(
        container="mp3",
        media_type="audio/mpeg",
        suffixes=(".mp3",),
        audio=_MP3,
        can_stream=False,  # so is that of a variable bit rate
    ),
    "opus": Format(
        container="ogg", media_type="audio/ogg", suffixes=(".opus", ".ogg"), audio=_OPUS
    ),
}
# Formats of videos that Pillow writes.
ANIMATIONS: Mapping[str, str] = {"webp": "image/webp", "gif": "image/gif"}


def format_of(suffix: str) -> str | None:
    """Returns the format of a file's suffix; ``None`` for another one."""
    known = (name for name, found in FORMATS.items() if suffix.lower() in found.suffixes)
    return next(known, suffix[1:].lower() if suffix[1:].lower() in ANIMATIONS else None)
