"""Tiny modular pipelines, code of blocks, and what they generate."""

import json

import diffusers
import numpy as np
import torch
from PIL import Image

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32}
IMAGE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
BLOCK = """
from diffusers import StableDiffusionXLAutoBlocks

from .helper import WORD


class Ours(StableDiffusionXLAutoBlocks):
    word = WORD
"""

INVERT = """
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
from PIL import ImageOps


class Invert(ModularPipelineBlocks):
    model_name = "stable-diffusion-xl"

    def __init__(self, by=255):
        super().__init__()
        self.by = by

    @property
    def inputs(self):
        return [InputParam("images")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.images = [ImageOps.invert(image) for image in block_state.images]
        self.set_block_state(state, block_state)
        return components, state
"""


def generate(pipeline, seed=0, **more):
    """Pixels of one image; diffusers' own call."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipeline, diffusers.ModularPipeline):
        images = pipeline(**CALL, **more, generator=generator, output="images")
    else:
        images = pipeline(**CALL, **more, generator=generator).images
    return np.asarray(images[0]).astype(int)


def write_blocks(folder, word="ours", code=BLOCK):
    """Puts the code of blocks into a folder, as people do for a repository."""
    (folder / "block.py").write_text(code)
    (folder / "helper.py").write_text(f"WORD = {word!r}\n")
    auto_map = {"ModularPipelineBlocks": "block.Ours"}
    (folder / "modular_config.json").write_text(json.dumps({"auto_map": auto_map}))


def rewrite(path, **entries):
    """Changes entries of a JSON file; ``None`` takes one out."""
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def entry(library, name, repository=None, subfolder="", **more):
    details = {"type_hint": [library, name], "pretrained_model_name_or_path": repository}
    return [library, name, {**details, "subfolder": subfolder, **more}]
