"""Saves results as image, video and audio files, by the suffix of the name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.media import FORMATS, Audio, Video, format_of, write_media
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.store import storage_errors
from bentoml_diffusers.workflow.files import (
    IMAGE_SUFFIXES,
    MAX_EMBEDDED_BYTES,
    embed_in_media,
    save_image,
    write_image,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from bentoml_diffusers.tasks import OutputLayout
    from bentoml_diffusers.workflow.files import Workflow


def save_output(
    output: Sequence[Any],
    layout: OutputLayout,
    workflow: Workflow | None,
    path: str | os.PathLike[str],
    *,
    infotext: bool = False,
    codec: str = "h264",
) -> list[Path]:
    """Writes an output into files.

    Args:
        output: Output of a pipeline.
        layout: Layout of its values.
        workflow: The workflow that made it, to be embedded, if any.
        path: Path of the file; the suffix chooses between images, videos and sound.
        infotext: Write the text of AUTOMATIC1111's web UI into images, too.
        codec: ``"h264"`` or ``"av1"``, for an MP4.

    Returns:
        The files.

    Raises:
        InvalidRequest: 400, a suffix that does not fit the output.
    """
    target = Path(path).expanduser()
    file_format = _find_format(target.suffix, codec)
    items = _choose(output, layout, target.suffix.lower(), file_format)
    if not items:
        raise InvalidRequest("path", target.name, f"a suffix for {_describe(layout, output)}")
    paths = [_number(target, index, len(items)) for index in range(len(items))]
    for index, (item, place) in enumerate(zip(items, paths, strict=True)):
        with storage_errors(place.name):
            if isinstance(item, (Video, Audio)):
                _save_media(item, place, str(file_format), workflow, index)
            elif workflow is not None:
                save_image(item, place, workflow, infotext=infotext, index=index)
            else:
                write_image(item, place)
    return paths


def _find_format(suffix: str, codec: str) -> str | None:
    found = format_of(suffix)
    if codec == "h264":
        return found
    if codec != "av1" or f"{found}-av1" not in FORMATS:
        raise InvalidRequest("codec", codec, "'h264', or 'av1' for .mp4")
    return f"{found}-av1"


def _choose(
    output: Sequence[Any], layout: OutputLayout, suffix: str, file_format: str | None
) -> Sequence[Any]:
    """Returns the images, videos or sounds that a file of this suffix can hold."""
    images = [one for one in layout.images(output) if isinstance(one, Image.Image)]
    if suffix in IMAGE_SUFFIXES and images:
        return images
    if file_format is None:
        return []
    is_sound = file_format in FORMATS and FORMATS[file_format].video is None
    return layout.audios(output) if is_sound else layout.videos(output)


def _describe(layout: OutputLayout, output: Sequence[Any]) -> str:
    kinds = {
        "images: .png, .jpg, .webp": layout.images(output),
        "videos: .mp4, .webm, .webp, .gif": layout.videos(output),
        "sound: .wav, .flac, .mp3, .opus": layout.audios(output),
    }
    return "; ".join(name for name, found in kinds.items() if found) or "images, video or sound"


def _number(path: Path, index: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{index}")


def _save_media(
    item: Video | Audio, path: Path, file_format: str, workflow: Workflow | None, index: int
) -> None:
    if workflow is None:
        write_media(item, path, file_format)
        return
    options = EmbedOptions(workflow=True, max_workflow_bytes=MAX_EMBEDDED_BYTES)
    embedding = embed_in_media(workflow, item, file_format, options, index)
    write_media(item, path, file_format, embedding.arguments)
    if not embedding.is_whole:
        workflow.save_workflow(path.parent, f"{path.stem}.json")
