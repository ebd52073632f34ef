"""Embeds a workflow in the image that it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidWorkflow
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.store import storage_errors
from bentoml_diffusers.workflow.files.blobs import encode_base64
from bentoml_diffusers.workflow.files.containers import (
    BLOB_KEY,
    KEY,
    MAX_TEXT_BYTES,
    ImageFormat,
    save_arguments,
)
from bentoml_diffusers.workflow.files.infotext import make_infotext
from bentoml_diffusers.workflow.files.suffixes import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from PIL import Image

    from bentoml_diffusers.workflow.files.schema import Workflow

# Compression of files; Pillow's own default is lower.
_QUALITY: Mapping[str, Mapping[str, Any]] = {"jpeg": {"quality": 95}, "webp": {"quality": 90}}


@dataclass(frozen=True)
class Embedding:
    """How to embed a workflow in an image.

    Attributes:
        arguments: Arguments for Pillow's ``save``.
        workflow_bytes: Size of the workflow's texts; 0 if none was asked for.
        is_whole: True if nothing had to be left out.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    workflow_bytes: int = 0
    is_whole: bool = True


def embed_workflow(
    workflow: Workflow,
    image: Image.Image,
    image_format: ImageFormat,
    options: EmbedOptions,
    index: int = 0,
) -> Embedding:
    """Returns how to embed a workflow in an image: completely or not at all.

    Args:
        workflow: The workflow that made the image.
        image: An image of its output.
        image_format: Format that it is saved in.
        options: What to embed.
        index: Number of the image among those that the workflow made.
    """
    texts = _write_texts(workflow) if options.workflow else {}
    size = sum(len(text.encode()) for text in texts.values())
    is_whole = size <= options.max_workflow_bytes
    infotext = make_infotext(workflow, image.size, index) if options.infotext else None
    arguments = save_arguments(image_format, texts if is_whole else {}, infotext)
    return Embedding(arguments, size, is_whole)


def save_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    workflow: Workflow,
    *,
    infotext: bool = False,
    index: int = 0,
    **arguments: Any,
) -> Path:
    """Saves an image with the workflow that made it embedded.

    Anyone with the file can read the prompt, and the input images.

    Args:
        image: An image of the workflow's output.
        path: ``*.png``, ``*.jpg``, ``*.jpeg`` or ``*.webp``.
        workflow: The workflow that made it.
        infotext: Write the text of AUTOMATIC1111's web UI, too.
        index: Number of the image among those that the workflow made.
        **arguments: More for Pillow's ``save``, such as ``quality``.

    Raises:
        InvalidWorkflow: 400, a file name without such a suffix, or a workflow beyond 48 MiB.
        StorageFull: 507, no space left.
    """
    target = Path(path).expanduser()
    image_format = IMAGE_SUFFIXES.get(target.suffix.lower())
    if image_format is None:
        raise InvalidWorkflow(
            "path", target.name, f"a file name that ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    options = EmbedOptions(workflow=True, infotext=infotext, max_workflow_bytes=MAX_TEXT_BYTES)
    embedding = embed_workflow(workflow, image, image_format, options, index)
    if not embedding.is_whole:
        raise InvalidWorkflow(
            "workflow",
            f"{embedding.workflow_bytes} bytes",
            f"at most {MAX_TEXT_BYTES} in an image; save_workflow has no such limit",
        )
    with storage_errors(target.name):
        write_image(image, target, **embedding.arguments, **arguments)
    return target


def write_image(image: Image.Image, path: Path, **arguments: Any) -> None:
    """Writes an image in the format of its suffix.

    Args:
        image: The image.
        path: A path with one of ``IMAGE_SUFFIXES``.
        **arguments: Arguments for Pillow's ``save``.
    """
    image_format = IMAGE_SUFFIXES[path.suffix.lower()]
    opaque = image.convert("RGB") if image_format == "jpeg" else image
    opaque.save(path, image_format, **{**_QUALITY.get(image_format, {}), **arguments})


def _write_texts(workflow: Workflow) -> dict[str, str]:
    text = workflow.to_json(inline_blobs=False)
    blobs = {f"{BLOB_KEY}{name}": encode_base64(data) for name, data in workflow.blobs.items()}
    # The two characters that JSON allows unescaped, but XML does not.
    return {KEY: text.replace("\ufffe", r"\ufffe").replace("\uffff", r"\uffff"), **blobs}
