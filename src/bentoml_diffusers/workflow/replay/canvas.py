"""Results in the size of the input image, whatever sizes a pipeline takes.

diffusers rounds the sides of an image down to multiples of 8 or 16, or takes a size of its own, and
squashes image and mask to it. Here both are padded to the next multiple with the pixels at their
edge, and the output is cropped: no pixel is resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.tasks import Task

_NOT_PADDED = ("ip_adapter_image",)  # describes the content, not the layout
_ANY_STEP = 16  # px, for pipelines that do not define theirs; suits all families


@dataclass(frozen=True)
class Canvas:
    """How the images of a request were padded, and how to undo it.

    Attributes:
        size: Width and height of the input image, in pixels.
        padded: Width and height of the image that the pipeline gets.
    """

    size: tuple[int, int]
    padded: tuple[int, int]

    def restore(self, output: Any) -> Any:
        """Returns an output of diffusers, or a tuple, with its images in the original size.

        Blocks return a bare list.
        """
        if isinstance(output, tuple):
            return (self._restore_all(output[0]), *output[1:])
        if hasattr(output, "images"):
            output.images = self._restore_all(output.images)
            return output
        return self._restore_all(output)

    def restore_image(self, image: Image.Image) -> Image.Image:
        """Crops an image; one whose size the pipeline chose by itself is resized."""
        if image.size == self.padded:
            return image.crop((0, 0, *self.size)) if self.size != self.padded else image
        if image.size == self.size:
            return image
        return image.resize(self.size, Image.Resampling.LANCZOS)

    def _restore_all(self, images: Any) -> Any:
        if not isinstance(images, list):
            return images
        return [self.restore_image(one) if isinstance(one, Image.Image) else one for one in images]


def fit_to_image(
    pipeline: Any, task: Task, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], Canvas | None]:
    """Returns the arguments for a result in the size of ``image``.

    A size in the arguments takes precedence; if only one side is given, the other is that of the
    image. With ``padding_mask_crop`` the pipeline itself pastes its output into the image.

    Args:
        pipeline: The pipeline.
        task: The task of the call.
        arguments: The arguments of the call.

    Returns:
        The arguments, and how to restore the size; ``None`` if there is nothing to restore.
    """
    image = arguments.get("image")
    if not isinstance(image, Image.Image):
        return dict(arguments), None
    step = _find_step(pipeline)
    width, height = (math.ceil(side / step) * step for side in image.size)
    sides = {"height": height, "width": width} if {"height", "width"} <= set(task.inputs) else {}
    given = {name: arguments[name] for name in sides if arguments.get(name) is not None}
    changed = {**arguments, **sides, **given}
    if given:
        return changed, None
    canvas = Canvas(image.size, (width, height))
    if arguments.get("padding_mask_crop") is None and canvas.size != canvas.padded:
        for name, part in arguments.items():
            is_beside = isinstance(part, Image.Image) and part.size == image.size
            if is_beside and name not in _NOT_PADDED:
                changed[name] = _pad(part, canvas.padded)
    return changed, canvas


def _find_step(pipeline: Any) -> int:
    """Returns the number of pixels that the sides of a pipeline's images are multiples of."""
    config = getattr(getattr(pipeline, "image_processor", None), "config", None)
    scale, patch = (getattr(pipeline, name, None) for name in ("vae_scale_factor", "patch_size"))
    steps = [
        getattr(config, "vae_scale_factor", None),
        scale * patch if isinstance(scale, int) and isinstance(patch, int) else scale,
    ]
    known = [step for step in steps if isinstance(step, int) and step > 0]
    return math.lcm(*known) if config is not None and known else _ANY_STEP


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Repeats the pixels of the right and the lower edge."""
    plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
    right, below = size[0] - image.width, size[1] - image.height
    edges = [(0, below), (0, right), (0, 0)][: np.asarray(plain).ndim]
    return Image.fromarray(np.pad(np.asarray(plain), edges, mode="edge"))
