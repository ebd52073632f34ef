"""Video and audio as files, by PyAV: into a file, or as a stream of bytes while it is encoded."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bentoml_diffusers.errors import CodecMissing, PipelineFailed
from bentoml_diffusers.media.animations import encode_animation
from bentoml_diffusers.media.formats import ANIMATIONS, FORMATS
from bentoml_diffusers.media.values import Video

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from bentoml_diffusers.media.formats import Codec, Format
    from bentoml_diffusers.media.values import Audio

_NO_TEXTS: Mapping[str, Any] = MappingProxyType({})
_LAYOUTS = {1: "mono", 2: "stereo"}
_MAX_DENOMINATOR = 1001  # of 30000/1001 and its like
_SECONDS_OF_GROUP = 2  # between two frames that players can jump to, and pieces of a stream
_BUFFER_BYTES = 64 * 1024  # besides the texts
_BT709 = 1  # FFmpeg's number of the color space, primaries and transfer of HD video
_LIMITED_RANGE = 1


def has_codecs() -> bool:
    """True if PyAV is installed."""
    return find_spec("av") is not None


def import_av() -> Any:
    """Returns PyAV.

    Raises:
        CodecMissing: 501, it is not installed.
    """
    os.environ.setdefault("SVT_LOG", "1")  # errors only; the encoder prints its settings otherwise
    try:
        import av
    except ImportError as err:
        raise CodecMissing("video and audio") from err
    return av


def write_media(
    media: Video | Audio, path: Path, file_format: str, metadata: Mapping[str, Any] = _NO_TEXTS
) -> None:
    """Encodes a video or a sound into a file.

    Args:
        media: What to encode.
        path: Of the file; another one there is overwritten.
        file_format: One of the formats of its kind.
        metadata: Texts for the container by name; of an animation, arguments for Pillow's ``save``.

    Raises:
        CodecMissing: 501, PyAV is not installed.
        PipelineFailed: 500, numbers that are not finite, or sound of more than two channels.
    """
    if file_format in ANIMATIONS:
        path.write_bytes(encode_animation(media, file_format, metadata))  # type: ignore[arg-type]
        return
    found = FORMATS[file_format]
    for _ in _encode(media, str(path), found, found.file_options, metadata):
        pass


def encode_media(
    media: Video | Audio, file_format: str, metadata: Mapping[str, Any] = _NO_TEXTS
) -> Iterator[bytes]:
    """Yields a video or a sound as a file, piece by piece while it is encoded.

    The arguments and errors are those of :func:`write_media`. A format that cannot be streamed
    comes in one piece.
    """
    if file_format in ANIMATIONS:
        yield encode_animation(media, file_format, metadata)  # type: ignore[arg-type]
        return
    found = FORMATS[file_format]
    if not found.can_stream:
        buffer = io.BytesIO()
        for _ in _encode(media, buffer, found, found.file_options, metadata):
            pass
        yield buffer.getvalue()
        return
    sink = _Sink()
    for _ in _encode(media, sink, found, found.stream_options, metadata):
        if sink.pieces:
            yield sink.take()


class _Sink:
    """A file that can only be written to."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self.pieces = b"".join(self.pieces), []
        return taken


def _encode(
    media: Video | Audio,
    target: Any,
    file_format: Format,
    options: Mapping[str, str],
    metadata: Mapping[str, str],
) -> Iterator[None]:
    """Yields when there may be something to take: after each frame, and at the end."""
    av = import_av()
    # FFmpeg goes back to write the size of a box, which in a stream it can only in its buffer.
    buffer_size = _BUFFER_BYTES + sum(len(str(text).encode()) for text in metadata.values())
    with av.open(
        target,
        "w",
        format=file_format.container,
        options=dict(options),
        buffer_size=buffer_size,
    ) as container:
        for name, text in metadata.items():
            container.metadata[name] = text
        if isinstance(media, Video):
            yield from _mux_video(av, container, media, file_format)
        else:
            sound = _Sound(av, container, media, file_format.audio)
            sound.encode_until(None)
            sound.flush()
    yield


def _mux_video(av: Any, container: Any, video: Video, file_format: Format) -> Iterator[None]:
    if file_format.video is None:
        raise ValueError(f"{file_format.container} holds no video")
    frames = _Frames(av, container, video, file_format.video)
    sound = None
    if video.audio is not None:
        sound = _Sound(av, container, video.audio, file_format.audio)
    for index in range(len(video)):
        frames.encode_next()
        if sound is not None:
            sound.encode_until((index + 1) / video.fps)
        yield
    frames.flush()
    if sound is not None:
        sound.encode_until(None)
        sound.flush()


class _Frames:
    """Encodes the frames of a video, one after the other, in BT.709."""

    def __init__(self, av: Any, container: Any, video: Video, codec: Codec) -> None:
        self._av, self._container = av, container
        self._frames = video.arrays()
        self._count = 0
        rate = Fraction(video.fps).limit_denominator(_MAX_DENOMINATOR)
        stream = container.add_stream(codec.name, rate=rate, options=dict(codec.options))
        width, height = video.size
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.gop_size = max(1, round(_SECONDS_OF_GROUP * video.fps))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._stream = stream

    def encode_next(self) -> None:
        frame = self._av.VideoFrame.from_ndarray(_to_even(next(self._frames)), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.duration = self._count, 1
        frame.time_base = 1 / self._stream.codec_context.framerate
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def flush(self) -> None:
        self._container.mux(self._stream.encode(None))


class _Sound:
    """Encodes sound, as far as the frames beside it are."""

    def __init__(self, av: Any, container: Any, audio: Audio, codec: Codec) -> None:
        self._av, self._container = av, container
        self._samples, self._rate = _check_samples(audio.samples), audio.sampling_rate
        self._done = 0
        self._layout = _LAYOUTS[self._samples.shape[0]]
        rate = _choose_rate(codec, audio.sampling_rate)
        self._stream = container.add_stream(codec.name, rate=rate, options=dict(codec.options))
        self._stream.layout = self._layout

    def encode_until(self, seconds: float | None) -> None:
        total = self._samples.shape[1]
        end = total if seconds is None else min(total, round(seconds * self._rate))
        if end <= self._done:
            return
        part = np.ascontiguousarray(self._samples[:, self._done : end])
        frame = self._av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts = self._rate, self._done
        frame.time_base = Fraction(1, self._rate)
        self._done = end
        self._container.mux(self._stream.encode(frame))

    def flush(self) -> None:
        self._container.mux(self._stream.encode(None))


def _to_even(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Continues the right and the lower edge: codecs halve the sides of their colors."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return pixels


def _check_samples(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if samples.shape[0] not in _LAYOUTS:
        raise PipelineFailed("the model", ValueError(f"sound of {samples.shape[0]} channels"))
    if not np.isfinite(samples).all():
        raise PipelineFailed("the model", ValueError("sound with NaN or infinity"))
    clipped: np.ndarray[Any, Any] = np.clip(samples, -1, 1)
    return clipped


def _choose_rate(codec: Codec, rate: int) -> int:
    """The same where the codec takes it, else the next above, else the highest."""
    if not codec.rates:
        return min(rate, codec.max_rate)
    return min((known for known in codec.rates if known >= rate), default=codec.rates[-1])
