"""Text to image, image to image and inpainting as methods of one pipeline.

Code that is stored with a model:

    bentoml diffusers import mega FOLDER --custom-pipeline examples/mega --trust-remote-code
"""

import functools
from typing import Any

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)


class MegaPipeline(StableDiffusionPipeline):
    """Three tasks over the same components; nothing is loaded twice."""

    @functools.wraps(StableDiffusionPipeline.__call__)  # so that arguments can be checked
    def text2img(self, *args: Any, **kwargs: Any) -> Any:
        """Makes images from a prompt."""
        return self._as(StableDiffusionPipeline)(*args, **kwargs)

    @functools.wraps(StableDiffusionImg2ImgPipeline.__call__)  # so that arguments can be checked
    def img2img(self, *args: Any, **kwargs: Any) -> Any:
        """Makes images from a prompt and an image."""
        return self._as(StableDiffusionImg2ImgPipeline)(*args, **kwargs)

    @functools.wraps(StableDiffusionInpaintPipeline.__call__)  # so that arguments can be checked
    def inpaint(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the masked part of an image anew."""
        return self._as(StableDiffusionInpaintPipeline)(*args, **kwargs)

    def _as(self, cls: type[StableDiffusionPipeline]) -> Any:
        pipeline = cls(**self.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline
