"""A workflow inside the picture that it made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bentoml_diffusers.errors import InvalidWorkflow
from bentoml_diffusers.store.linking import storage_errors
from bentoml_diffusers.workflow import containers
from bentoml_diffusers.workflow.blobs import encode_base64
from bentoml_diffusers.workflow.containers import BLOB_KEY, KEY, PictureFormat
from bentoml_diffusers.workflow.infotext import make_infotext

if TYPE_CHECKING:
    import os

    from PIL import Image

    from bentoml_diffusers.workflow.schema import Workflow

_SUFFIXES: dict[str, PictureFormat] = {
    ".jpg": "jpeg",
    **{f".{name}": name for name in get_args(PictureFormat)},
}


def workflow_texts(workflow: Workflow) -> dict[str, str]:
    """Returns the texts that hold a workflow in a picture, its blobs included."""
    text = workflow.to_json(inline_blobs=False)
    blobs = {f"{BLOB_KEY}{name}": encode_base64(data) for name, data in workflow.blobs.items()}
    # The two characters that JSON may hold as they are, and XML may not.
    return {KEY: text.replace("\ufffe", r"\ufffe").replace("\uffff", r"\uffff"), **blobs}


def save_picture(
    picture: Image.Image,
    path: str | os.PathLike[str],
    workflow: Workflow,
    *,
    infotext: bool = False,
    index: int = 0,
    **arguments: Any,
) -> Path:
    """Saves a picture with the workflow that made it inside.

    Whoever has the file can read prompts, and the pictures that went in.

    Args:
        picture: A picture of the workflow's output.
        path: ``*.png``, ``*.jpg``, ``*.jpeg`` or ``*.webp``.
        workflow: What made it.
        infotext: Write AUTOMATIC1111's ``parameters``, too.
        index: Number of the picture among those that the workflow made.
        **arguments: More for Pillow's ``save``, such as ``quality``.

    Raises:
        InvalidWorkflow: 400, a file name without such an end, or a workflow beyond 48 MiB.
        StorageFull: 507, no space left.
    """
    target = Path(path).expanduser()
    picture_format = _SUFFIXES.get(target.suffix.lower())
    if picture_format is None:
        raise InvalidWorkflow("path", target.name, f"a name that ends in {', '.join(_SUFFIXES)}")
    texts = workflow_texts(workflow)
    size = sum(len(text.encode()) for text in texts.values())
    if size > containers.MAX_TEXT_BYTES:
        raise InvalidWorkflow(
            "workflow",
            f"{size} bytes",
            f"at most {containers.MAX_TEXT_BYTES} in a picture; save_workflow has no such limit",
        )
    text = make_infotext(workflow, picture.size, index) if infotext else None
    metadata = containers.save_arguments(picture_format, texts, text)
    opaque = picture.convert("RGB") if picture_format == "jpeg" else picture
    with storage_errors(target.name):
        opaque.save(target, picture_format, **metadata, **arguments)
    return target
