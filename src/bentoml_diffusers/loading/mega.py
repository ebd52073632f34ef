"""Text to image, image to image and inpainting as methods of one pipeline."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from bentoml_diffusers._compat import progress_bar_options


class StableDiffusionMegaPipeline(StableDiffusionPipeline):  # type: ignore[misc]
    """Stable Diffusion with the methods of diffusers' community pipeline of this name.

    All methods run on the same components; nothing is loaded twice. ``__call__`` is
    ``text2img``.
    """

    @functools.wraps(StableDiffusionPipeline.__call__)
    def text2img(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :class:`diffusers.StableDiffusionPipeline`."""
        return self._as(StableDiffusionPipeline)(*args, **kwargs)

    @functools.wraps(StableDiffusionImg2ImgPipeline.__call__)
    def img2img(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :class:`diffusers.StableDiffusionImg2ImgPipeline`."""
        return self._as(StableDiffusionImg2ImgPipeline)(*args, **kwargs)

    @functools.wraps(StableDiffusionInpaintPipeline.__call__)
    def inpaint(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :class:`diffusers.StableDiffusionInpaintPipeline`."""
        return self._as(StableDiffusionInpaintPipeline)(*args, **kwargs)

    def _as(self, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
        pipeline = cls(**self.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(**progress_bar_options(self))
        return pipeline
