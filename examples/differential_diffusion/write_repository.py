"""Writes the small SDXL with the blocks of differential diffusion as a modular repository.

python write_repository.py build/differential_diffusion
bentoml diffusers import differential-diffusion build/differential_diffusion --trust-remote-code
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from block import DifferentialDiffusionBlocks
from small_sdxl import build_components

if TYPE_CHECKING:
    from diffusers import ModularPipeline

HERE = Path(__file__).parent


def make_pipeline() -> ModularPipeline:
    """Returns the modular pipeline with all its components."""
    pipeline = DifferentialDiffusionBlocks().init_pipeline()
    pipeline.update_components(**build_components(), force_zeros_for_empty_prompt=False)
    pipeline.update_components(guider=pipeline.guider.new(guidance_scale=4.0))
    return pipeline


def write_repository(pipeline: ModularPipeline, folder: Path) -> None:
    """Writes what diffusers needs to load it: components, index, and the code of the blocks."""
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    pipeline.blocks.save_pretrained(folder)
    # What diffusers does not save: the code of the blocks, and the guider.
    shutil.copy(HERE / "block.py", folder)
    pipeline.guider.save_pretrained(folder / "guider")
    path = folder / "modular_model_index.json"
    kind = ["diffusers", type(pipeline.guider).__name__]
    place = {"pretrained_model_name_or_path": None, "subfolder": "guider", "type_hint": kind}
    index = {**json.loads(path.read_text()), "guider": [*kind, place]}
    path.write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where to write it")
    write_repository(make_pipeline(), parser.parse_args().folder)
