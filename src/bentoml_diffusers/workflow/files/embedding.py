"""Embeds a workflow in the video or audio file that it made, as one of the file's texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers.media import FORMATS, Video
from bentoml_diffusers.workflow.files.images import Embedding, embed_workflow

if TYPE_CHECKING:
    from bentoml_diffusers.media import Audio
    from bentoml_diffusers.options import EmbedOptions
    from bentoml_diffusers.workflow.files.schema import Workflow


def embed_in_media(
    workflow: Workflow,
    media: Video | Audio,
    file_format: str,
    options: EmbedOptions,
    index: int = 0,
) -> Embedding:
    """Returns how to embed a workflow in a file of video or audio: completely or not at all.

    The ``arguments`` are texts for the container, or for an animated WebP those of Pillow's
    ``save``. A GIF cannot hold one. Infotext goes into a WebP only.

    Args:
        workflow: The workflow that made it.
        media: A video or a sound of its output.
        file_format: Format that it is encoded in.
        options: What to embed.
        index: Number of the video among those that the workflow made.
    """
    if file_format == "webp" and isinstance(media, Video):
        return embed_workflow(workflow, media.images[0], "webp", options, index)
    if not options.workflow:
        return Embedding()
    text = workflow.to_json()
    size = len(text.encode())
    found = FORMATS.get(file_format)
    if found is None or size > min(options.max_workflow_bytes, found.max_text_bytes):
        return Embedding({}, size, is_whole=False)
    return Embedding({found.text_key: text}, size)
