"""Corners of diffusers' modular pipelines. This module does not load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Set by diffusers on every block, or said by the sub-blocks themselves. Until it (0.42) saves
# blocks that were put together by hand.
BLOCK_STATE = (
    *("sub_blocks", "block_classes", "block_names"),
    *("_internal_dict", "_progress_bar_config"),
)


def find_modular_class(index: Mapping[str, Any]) -> str | None:
    """Returns the name of the modular class for a classic pipeline's index; ``None``: no such one.

    Until ``ModularPipeline.from_pretrained`` (0.42) tells it without loading.
    """
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
    from diffusers.pipelines.auto_pipeline import _get_model

    choose = MODULAR_PIPELINE_MAPPING.get(_get_model(index["_class_name"]))
    return None if choose is None else str(choose(index))


def blocks_of(pipeline: Any) -> Any:
    """Returns the blocks that a modular pipeline runs; ``None`` for a classic one.

    Its ``blocks`` are a copy. Until diffusers (0.42) gives out its own.
    """
    return getattr(pipeline, "_blocks", None)


def copy_blocks(pipeline: Any) -> Any:
    """Gives a copy of a modular pipeline blocks of its own, and returns them.

    Until ``copy`` of one (0.42) does so.
    """
    pipeline._blocks = pipeline.blocks  # a copy
    return pipeline._blocks


def workflow_map(blocks: Any) -> Mapping[str, Any]:
    """Returns the modular workflows of blocks by name, with the inputs that trigger them.

    Until diffusers (0.42) tells it in public.
    """
    return getattr(blocks, "_workflow_map", None) or {}


def components_manager(pipeline: Any) -> Any:
    """Returns the components manager of a modular pipeline.

    Until diffusers (0.42) tells it in public.
    """
    return pipeline._components_manager
