"""The output of a task: names and kinds of its values, frame rate and sampling rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bentoml_diffusers.media import Audio, Video

if TYPE_CHECKING:
    from collections.abc import Sequence

OutputKind = Literal["image", "video", "audio", "latents", "other"]
_OUTPUT_KINDS: Mapping[str, OutputKind] = {
    **dict.fromkeys(("images", "image", "rgb"), "image"),
    **dict.fromkeys(("frames", "videos", "video"), "video"),
    **dict.fromkeys(("audios", "audio", "sound"), "audio"),
    **dict.fromkeys(("latents", "latent"), "latents"),
}
USUAL_FPS = 10.0  # default of diffusers' `export_to_video` and `export_to_gif`
# Arguments with the frame rate of a video.
_FPS_ARGUMENTS = ("frame_rate", "fps", "target_fps")
# Component and attribute with the sampling rate of a model's sound. The first counts: the vocoder
# runs last.
_RATE_PLACES = (
    ("vocoder", "output_sampling_rate"),
    ("vocoder", "sampling_rate"),
    ("sound_tokenizer", "sampling_rate"),
    ("audio_vae", "sampling_rate"),
    ("vae", "sampling_rate"),
    ("vae", "sample_rate"),
    ("unet", "sample_rate"),
    ("audio_vae", "sample_rate"),
)
_PIPELINE_RATE = "sample_rate"
_SOUND_NDIM, _VIDEO_NDIM, _BATCH_NDIM = 3, 4, 5


@dataclass(frozen=True)
class Output:
    """The output of a task.

    Attributes:
        name: Name of its first value in the class or the blocks, such as ``"images"``.
        others: Names of further values, such as ``"nsfw_content_detected"``.
        fps: Frames per second of a video, if the request does not set it.
    """

    name: str
    others: tuple[str, ...] = ()
    fps: float = USUAL_FPS

    @property
    def kind(self) -> OutputKind:
        """Kind of the first value."""
        return kind_of(self.name)

    @property
    def has_sound(self) -> bool:
        """True for a video with sound."""
        return self.kind == "video" and any(kind_of(name) == "audio" for name in self.others)


@dataclass(frozen=True)
class OutputLayout:
    """The layout of one output: names and properties of its values.

    Attributes:
        names: Names of its values, in order; empty if they are unknown.
        is_latent: Images, frames and sound are latents: ``output_type="latent"``.
        fps: Frames per second of its videos.
        sampling_rate: Samples per second of its sound; ``None`` if the model does not define it.
    """

    names: tuple[str, ...] = ()
    is_latent: bool = False
    fps: float = USUAL_FPS
    sampling_rate: int | None = None

    def name_all(self, output: Sequence[Any]) -> dict[str, Any]:
        """Returns the values of an output by name."""
        if len(output) == 1 and isinstance(output[0], Mapping):  # of a modular pipeline
            return dict(output[0])
        return dict(zip(self.names, output, strict=False))

    def find(self, kind: OutputKind, output: Sequence[Any]) -> list[Any]:
        """Returns the values of one kind."""
        named = self.name_all(output).items()
        return [value for name, value in named if self._kind(name) == kind and value is not None]

    def images(self, output: Sequence[Any]) -> list[Any]:
        """Returns the images of an output: its first value, unless that is video or audio."""
        found = self.find("image", output)
        is_other = bool(self.names) and kind_of(self.names[0]) in ("video", "audio")
        if found or is_other or not output:
            return list(found[0]) if found else []
        return list(output[0])

    def videos(self, output: Sequence[Any]) -> list[Video]:
        """Returns the videos of an output, each with its sound."""
        videos = [frames for value in self.find("video", output) for frames in _split_video(value)]
        audios: list[Audio | None] = list(self.audios(output))
        if len(audios) != len(videos):
            audios = [None] * len(videos)
        return [
            Video(frames, self.fps, audio) for frames, audio in zip(videos, audios, strict=True)
        ]

    def audios(self, output: Sequence[Any]) -> list[Audio]:
        """Returns the sound of an output; none where the sampling rate is unknown."""
        if self.sampling_rate is None:
            return []
        sounds = [sound for value in self.find("audio", output) for sound in _split_sound(value)]
        return [Audio.of(sound, self.sampling_rate) for sound in sounds]

    def _kind(self, name: str) -> OutputKind:
        kind = kind_of(name)
        return "latents" if self.is_latent and kind != "other" else kind


def kind_of(name: str) -> OutputKind:
    """Returns the kind of an output's value, by its name."""
    return _OUTPUT_KINDS.get(name, "other")


def read_layout(
    pipeline: Any, output: Output, returned: Any, arguments: Mapping[str, Any]
) -> OutputLayout:
    """Returns the layout of an output.

    Args:
        pipeline: The pipeline that ran.
        output: The output of its task.
        returned: What the pipeline returned: its output object, a tuple, or a single value.
        arguments: Arguments of the call, completed with defaults.
    """
    names = (output.name, *output.others)
    if hasattr(returned, "to_tuple"):
        names = tuple(returned.keys())  # those that are not `None`, as in its tuple
    elif isinstance(arguments.get("output"), str):  # of a modular pipeline
        names = (arguments["output"],)
    return OutputLayout(
        names,
        is_latent=arguments.get("output_type") == "latent",
        fps=next(_list_fps(arguments), output.fps),
        sampling_rate=find_sampling_rate(pipeline),
    )


def find_sampling_rate(pipeline: Any) -> int | None:
    """Returns the samples per second of a pipeline's sound, if it defines them."""
    for component, name in _RATE_PLACES:
        part = getattr(pipeline, component, None)
        found = getattr(getattr(part, "config", None), name, None)
        if isinstance(found, int):
            return found
    found = getattr(pipeline, _PIPELINE_RATE, None)
    return found if isinstance(found, int) else None


def _list_fps(arguments: Mapping[str, Any]) -> Any:
    values = (arguments.get(name) for name in _FPS_ARGUMENTS)
    return (float(value) for value in values if isinstance(value, (int, float)) and value > 0)


def _split_video(value: Any) -> list[Any]:
    """Splits a value that may hold one video, or one per prompt."""
    shape = getattr(value, "shape", None)
    is_one = len(shape) == _VIDEO_NDIM if shape is not None else _is_list_of_frames(value)
    return [value] if is_one else list(value)


def _is_list_of_frames(value: Sequence[Any]) -> bool:
    first = value[0] if len(value) else None
    return not isinstance(first, (list, tuple)) and getattr(first, "ndim", 0) < _VIDEO_NDIM


def _split_sound(value: Any) -> list[Any]:
    """Splits (batch, channels, samples), (batch, samples), (samples,), or a list of sounds."""
    return [value] if getattr(value, "ndim", 2) == 1 else list(value)
