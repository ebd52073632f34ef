"""Node configs for Mellon, a node editor, as diffusers' own utilities make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.loading.modular import stored_blocks
from bentoml_diffusers.store import read_record

if TYPE_CHECKING:
    import bentoml

    from bentoml_diffusers.options import ModelOptions


def mellon_config(model: bentoml.Model, options: ModelOptions | None = None) -> str:
    """Returns the Mellon config for the blocks of a stored modular pipeline, as JSON.

    Blocks of diffusers become its nodes: text encoder, denoise, decoder and so on. Others become
    one node with all their inputs and outputs.

    Args:
        model: A stored modular pipeline.
        options: See :func:`bentoml_diffusers.loading.stored_blocks`.

    Raises:
        InvalidModel: 400, no modular pipeline, or a broken one.
        InvalidOption: 400, no such modular workflow.
        UntrustedSource: 400, the model brings code that is not trusted.
    """
    from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig

    blocks = stored_blocks(model, options)
    record = read_record(Path(model.path))
    is_of_hub = record is not None and record.commit is not None
    if type(blocks).__module__.startswith("diffusers.") and "denoise" in blocks.sub_blocks:
        config = MellonPipelineConfig.from_blocks(
            blocks,
            label=model.tag.name,
            default_repo=record.origin if is_of_hub and record is not None else "",
        )
    else:
        config = MellonPipelineConfig.from_custom_block(blocks)
    return str(config.to_json_string())
