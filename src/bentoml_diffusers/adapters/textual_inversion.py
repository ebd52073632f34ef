"""Textual inversions that stay loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel, UnsupportedByPipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.sources import Adapter


def load_textual_inversions(pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
    """Adds the tokens and vectors of ``adapters`` to tokenizer and text encoder.

    Raises:
        UnsupportedByPipeline: 400, the pipeline's class takes none.
        InvalidModel: 400, a file that is no embedding for this text encoder.
    """
    for adapter in adapters:
        if not hasattr(pipeline, "load_textual_inversion"):
            raise UnsupportedByPipeline(type(pipeline).__name__, "textual inversion")
        try:
            pipeline.load_textual_inversion(
                adapter.path, token=adapter.token, use_safetensors=True, **adapter.arguments
            )
        except (ValueError, OSError, KeyError, RuntimeError) as err:
            raise InvalidModel(
                adapter.name, f"is no textual inversion for {type(pipeline).__name__}: {err}"
            ) from err
