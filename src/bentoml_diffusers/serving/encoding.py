"""From a result to the bytes of an image, with what the service writes into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.workflow.files import Embedding, embed_workflow

if TYPE_CHECKING:
    from bentoml_diffusers.engine import Result
    from bentoml_diffusers.options import EmbedOptions
    from bentoml_diffusers.serving.codecs import OutputFormat


@dataclass(frozen=True)
class Encoded:
    """The image of a result as a file.

    Attributes:
        data: The file.
        media_type: Of it, such as ``"image/png"``.
        workflow: ``"embedded"`` or ``"too-large"``, where the service embeds workflows.
    """

    data: bytes
    media_type: str
    workflow: str | None = None


def encode_result(
    result: Result,
    output_format: OutputFormat,
    options: EmbedOptions,
    quality: int | None = None,
) -> Encoded:
    """Encodes the first image of a result; for ``quality`` see :func:`encode_image`."""
    image = result.images[0]
    embedding = Embedding()
    if result.workflow is not None:
        embedding = embed_workflow(result.workflow, image, output_format, options)
    data = encode_image(image, output_format, embedding.arguments, quality)
    said = "embedded" if embedding.is_whole else "too-large"
    return Encoded(data, f"image/{output_format}", said if options.workflow else None)
