"""A video and a sound, whatever array, tensor or list of images a pipeline makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHANNELS = (1, 3, 4)
_LEVELS = 255
_FRAME_NDIM = 3


@dataclass(frozen=True, repr=False)
class Audio:
    """Sound.

    Attributes:
        samples: float32 of shape (channels, samples), from -1 to 1.
        sampling_rate: Samples per second.
    """

    samples: np.ndarray[Any, Any]
    sampling_rate: int

    @classmethod
    def of(cls, samples: Any, sampling_rate: int) -> Audio:
        """Returns the sound of an array or tensor of shape (samples,) or (channels, samples)."""
        plain = _to_array(samples).astype(np.float32, copy=False)
        return cls(plain[None] if plain.ndim == 1 else plain, sampling_rate)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return float(self.samples.shape[-1] / self.sampling_rate)

    def describe(self) -> dict[str, Any]:
        """Returns its facts by name, for JSON."""
        return {
            "seconds": round(self.seconds, 6),
            "sampling_rate": self.sampling_rate,
            "channels": self.samples.shape[0],
        }

    def __repr__(self) -> str:
        """One line without samples."""
        channels = self.samples.shape[0]
        return f"<Audio: {self.seconds:.2f} s, {channels} x {self.sampling_rate} Hz>"


@dataclass(frozen=True, repr=False)
class Video:
    """Frames, and the sound that belongs to them.

    Attributes:
        frames: As the pipeline made them: a list of PIL images; an array of shape (frames, height,
            width, channels) or a tensor of (frames, channels, height, width), from 0 to 1.
        fps: Frames per second.
        audio: Its sound, of a model that makes both.
    """

    frames: Any
    fps: float
    audio: Audio | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self) / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px."""
        height, width = next(self.arrays()).shape[:2]
        return width, height

    @property
    def images(self) -> list[Image.Image]:
        """Returns the frames as RGB images."""
        return [Image.fromarray(frame) for frame in self.arrays()]

    def arrays(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yields each frame as uint8 of shape (height, width, 3)."""
        return map(_to_levels, self.frames)

    def describe(self) -> dict[str, Any]:
        """Returns its facts by name, for JSON."""
        width, height = self.size
        facts = {"width": width, "height": height, "frames": len(self), "fps": self.fps}
        return {**facts, "seconds": round(self.seconds, 6), "has_sound": self.audio is not None}

    def __repr__(self) -> str:
        """One line without pixels."""
        width, height = self.size
        sound = ", with sound" if self.audio is not None else ""
        return f"<Video: {len(self)} frames of {width}x{height} at {self.fps:g} fps{sound}>"


def _to_levels(frame: Any) -> np.ndarray[Any, Any]:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    pixels = _to_array(frame)
    is_tensor = not isinstance(frame, np.ndarray)
    has_channels_last = pixels.shape[-1] in _CHANNELS
    if (
        pixels.ndim == _FRAME_NDIM
        and pixels.shape[0] in _CHANNELS
        and (is_tensor or not has_channels_last)
    ):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.dtype != np.uint8:
        # Rounded as diffusers' own `numpy_to_pil` does it.
        pixels = (np.clip(pixels.astype(np.float32), 0, 1) * _LEVELS).round().astype(np.uint8)
    if pixels.ndim < _FRAME_NDIM or pixels.shape[-1] == 1:
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def _to_array(values: Any) -> np.ndarray[Any, Any]:
    """Of a tensor, which may be bfloat16, or of anything that is an array already."""
    if hasattr(values, "detach"):
        plain = values.detach().cpu()
        return np.asarray(plain if not plain.is_floating_point() else plain.float())
    return np.asarray(values)
