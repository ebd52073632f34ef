"""Uploaded videos as frames, within bounds: what a file says of itself is not believed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from bentoml_diffusers.media.encoders import import_av
from bentoml_diffusers.media.texts import SAFE_OPTIONS, find_container
from bentoml_diffusers.media.values import Video

if TYPE_CHECKING:
    from bentoml_diffusers.options import RequestLimits

_CONTAINERS = ("mp4", "matroska")
_CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4")
_MAX_STREAMS = 8
_USUAL_FPS = 10.0


def decode_video(data: bytes, limits: RequestLimits) -> Video:
    """Decodes an uploaded video. Nothing but the given bytes is read.

    Args:
        data: An MP4, WebM or Matroska file; its content counts, not its declared type.
        limits: Size, length and number of frames are checked before and while it is decoded.

    Raises:
        ValueError: Not a video, broken, or beyond the limits; the text says which.
        CodecMissing: 501, PyAV is not installed.
    """
    if len(data) > limits.max_upload_bytes:
        raise ValueError(f"{len(data)} bytes, expected at most {limits.max_upload_bytes}")
    container = find_container(data)
    if container not in _CONTAINERS:
        raise ValueError("not a video in a known format (MP4, WebM, Matroska)")
    av = import_av()
    try:
        with av.open(io.BytesIO(data), format=container, options=dict(SAFE_OPTIONS)) as file:
            stream = _choose_stream(file)
            _check_declared(file, stream, limits)
            frames = _decode(file, stream, limits)
            rate = stream.average_rate or stream.guessed_rate
    except (av.FFmpegError, MemoryError) as err:
        raise ValueError("a broken video") from err
    if not frames:
        raise ValueError("a video without frames")
    return Video(frames, float(rate) if rate else _USUAL_FPS)


def _choose_stream(file: Any) -> Any:
    if len(file.streams) > _MAX_STREAMS:
        raise ValueError(f"{len(file.streams)} streams, expected at most {_MAX_STREAMS}")
    if not file.streams.video:
        raise ValueError("no video in it")
    stream = file.streams.video[0]
    codec = stream.codec_context.codec.canonical_name
    if codec not in _CODECS:
        raise ValueError(f"a video in {codec}, expected {', '.join(_CODECS)}")
    return stream


def _check_declared(file: Any, stream: Any, limits: RequestLimits) -> None:
    """What the file says, before a frame is decoded."""
    seconds = (file.duration or 0) / 1_000_000
    if seconds > limits.max_seconds:
        raise ValueError(f"{seconds:.0f} seconds, expected at most {limits.max_seconds}")
    if stream.frames > limits.max_frames:
        raise ValueError(f"{stream.frames} frames, expected at most {limits.max_frames}")
    context = stream.codec_context
    if context.width and context.height:
        _check_frame(context.width, context.height, limits)


def _decode(file: Any, stream: Any, limits: RequestLimits) -> list[Image.Image]:
    frames: list[Image.Image] = []
    for frame in file.decode(stream):
        if len(frames) == limits.max_frames:
            raise ValueError(f"more than {limits.max_frames} frames")
        if (frame.time or 0) >= limits.max_seconds:  # a stream declares no length
            raise ValueError(f"more than {limits.max_seconds} seconds")
        _check_frame(frame.width, frame.height, limits)
        if frame.width * frame.height * (len(frames) + 1) > limits.max_pixel_frames:
            most = limits.max_pixel_frames
            raise ValueError(f"more than {most} pixels in all its frames")
        frames.append(Image.fromarray(frame.to_ndarray(format="rgb24")))
    return frames


def _check_frame(width: int, height: int, limits: RequestLimits) -> None:
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        most = f"at most {limits.max_side} per side and {limits.max_pixels} in all"
        raise ValueError(f"{width} x {height} pixels, expected {most}")
