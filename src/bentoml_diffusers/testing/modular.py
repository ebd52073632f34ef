"""A tiny Stable Diffusion XL made of blocks, and an IP-Adapter for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers.testing.seeding import seeded
from bentoml_diffusers.testing.unets import tiny_stable_diffusion_xl

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import ControlNetModel, StableDiffusionXLModularPipeline, UNet2DConditionModel
    from diffusers.modular_pipelines import ModularPipelineBlocks
    from transformers import CLIPVisionModelWithProjection

_IMAGE_WIDTH = 16  # of an image's embedding
_IMAGE_TOKENS = 4


@seeded
def tiny_modular_stable_diffusion_xl(
    seed: int = 0,
    *,
    blocks: ModularPipelineBlocks | None = None,
    controlnet: bool = False,
    image_encoder: bool = False,
) -> StableDiffusionXLModularPipeline:
    """Returns :func:`tiny_stable_diffusion_xl` made of blocks, with the same weights.

    Args:
        seed: Of the weights.
        blocks: What it is made of (``StableDiffusionXLAutoBlocks``).
        controlnet: With a ControlNet.
        image_encoder: With what an IP-Adapter needs, see :func:`save_tiny_ip_adapter`.
    """
    import torch
    from diffusers import StableDiffusionXLAutoBlocks

    pipeline = (blocks or StableDiffusionXLAutoBlocks()).init_pipeline()
    parts = dict(tiny_stable_diffusion_xl(seed).components)
    if controlnet:
        parts["controlnet"] = _controlnet(parts["unet"])
    if image_encoder:
        parts["image_encoder"] = _image_encoder()
    known = {name: parts.get(name) for name in pipeline.pretrained_component_names}
    pipeline.update_components(**{name: part for name, part in known.items() if part is not None})
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_ip_adapter(folder: Path, name: str = "tiny.safetensors", seed: int = 1) -> Path:
    """Writes a random IP-Adapter for the tiny SDXL; returns its file."""
    import torch
    from safetensors.torch import save_file

    unet = tiny_stable_diffusion_xl().unet
    width = unet.config.cross_attention_dim
    crossed = [key for key in unet.attn_processors if "attn2" in key]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {
            "image_proj.proj.weight": torch.randn(_IMAGE_TOKENS * width, _IMAGE_WIDTH),
            "image_proj.proj.bias": torch.randn(_IMAGE_TOKENS * width),
            "image_proj.norm.weight": torch.ones(width),
            "image_proj.norm.bias": torch.zeros(width),
        }
        for number, key in enumerate(crossed):
            size = unet.get_submodule(key.removesuffix(".processor")).inner_dim
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(size, width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return folder / name


def _controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    import torch
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    with torch.no_grad():
        for parameter in controlnet.parameters():  # its last layers are zero at first
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return controlnet


def _image_encoder() -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=_IMAGE_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,  # to which SDXL's blocks bring an image
            patch_size=56,
        )
    )
