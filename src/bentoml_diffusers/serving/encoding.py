"""From a result to the bytes of a file, with what the service writes into it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.media import FORMATS, encode_media
from bentoml_diffusers.serving.codecs import encode_image, media_type_of
from bentoml_diffusers.workflow.files import Embedding, embed_in_media, embed_workflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bentoml_diffusers.engine import Result
    from bentoml_diffusers.options import EmbedOptions


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is said of the file of a result.

    Attributes:
        media_type: Such as ``"image/png"``.
        workflow: ``"embedded"``, ``"too-large"``, or ``"no-place"`` for a GIF; where the service
            embeds workflows.
        kind: ``"image"``, ``"video"`` or ``"audio"``.
        about: Size, speed and length.
    """

    media_type: str
    workflow: str | None = None
    kind: str = "image"
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """The image, video or sound of a result as a file, with what is said of it."""

    data: bytes
    facts: FileFacts

    @property
    def media_type(self) -> str:
        """Of the file."""
        return self.facts.media_type


@dataclass(frozen=True)
class Streamed:
    """The same, encoded while it is read."""

    pieces: Iterator[bytes]
    facts: FileFacts


def kind_of(result: Result) -> str:
    """Returns whether a result is a video, sound or an image."""
    return "video" if result.videos else "audio" if result.audios else "image"


def can_stream(result: Result, output_format: str) -> bool:
    """True for a file that can be sent while it is encoded."""
    found = FORMATS.get(output_format)
    return kind_of(result) != "image" and found is not None and found.can_stream


def encode_result(
    result: Result, output_format: str, options: EmbedOptions, quality: int | None = None
) -> Encoded:
    """Encodes the first image, video or sound; for ``quality`` see :func:`encode_image`.

    Raises:
        CodecMissing: 501, PyAV is not installed.
        PipelineFailed: 500, sound that holds NaN.
    """
    if kind_of(result) != "image":
        streamed = stream_result(result, output_format, options)
        return Encoded(b"".join(streamed.pieces), streamed.facts)
    image = result.images[0]
    embedding = Embedding()
    if result.workflow is not None:
        embedding = embed_workflow(result.workflow, image, output_format, options)  # type: ignore[arg-type]
    data = encode_image(image, output_format, embedding.arguments, quality)  # type: ignore[arg-type]
    facts = FileFacts(
        media_type=f"image/{output_format}",
        workflow=_describe(embedding, output_format) if options.workflow else None,
        about={"width": image.width, "height": image.height},
    )
    return Encoded(data, facts)


def stream_result(result: Result, output_format: str, options: EmbedOptions) -> Streamed:
    """Begins to encode the first video or sound of a result. Raises as :func:`encode_result`."""
    kind = kind_of(result)
    media = result.videos[0] if kind == "video" else result.audios[0]
    embedding = Embedding()
    if result.workflow is not None:
        embedding = embed_in_media(result.workflow, media, output_format, options)
    pieces = encode_media(media, output_format, embedding.arguments)
    first = next(pieces)  # what is wrong is said with the status of the answer
    facts = FileFacts(
        media_type=media_type_of(kind, output_format),
        workflow=_describe(embedding, output_format) if options.workflow else None,
        kind=kind,
        about=media.describe(),
    )
    return Streamed(itertools.chain([first], pieces), facts)


def _describe(embedding: Embedding, output_format: str) -> str:
    if embedding.is_whole:
        return "embedded"
    return "no-place" if output_format == "gif" else "too-large"
