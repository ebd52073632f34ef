"""Stores what diffusers' ``save_pretrained`` leaves out of a classic pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import PIPELINE_FOLDER
from bentoml_diffusers.store.sources import read_classic_index, read_components

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline


def write_left_out(pipeline: DiffusionPipeline, root: Path) -> None:
    """Writes the components that are arguments with a default, which diffusers skips.

    Raises:
        InvalidModel: 400, a component that cannot be written.
    """
    # `pipeline.components` skips them too.
    for name in read_components(pipeline.config, type(pipeline).__name__):
        component = getattr(pipeline, name, None)
        if component is None or (root / name).is_dir():
            continue
        if not hasattr(component, "save_pretrained"):
            kind = type(component).__name__
            raise InvalidModel(
                type(pipeline).__name__,
                f"has a {name} that cannot be saved, {kind}",
                "take it out, save, and put it back after load_model",
            )
        component.save_pretrained(root / name)


def find_left_out(root: Path) -> dict[str, tuple[str, str]]:
    """Returns library and class of those components in a stored pipeline, by their names."""
    index = read_classic_index(root, PIPELINE_FOLDER)
    return {
        name: component
        for name, component in read_components(index, PIPELINE_FOLDER).items()
        if (root / name).is_dir() and _names.is_never_loaded(index, name)
    }
