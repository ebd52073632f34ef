"""Tiny pipelines of the classes that the documentation names, with random weights."""

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    KarrasVePipeline,
    KarrasVeScheduler,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import ScoreSdeVpScheduler

from bentoml_diffusers import testing
from bentoml_diffusers.loading.score_sde_vp import ScoreSdeVpPipeline


def unet_2d(channels=3, **more):
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **more,
    )


def vq_model():
    return VQModel(
        in_channels=3,
        out_channels=3,
        latent_channels=3,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )


def inpaint():
    base = testing.tiny_stable_diffusion()
    unet = UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 9})
    return StableDiffusionInpaintPipeline(
        **{**base.components, "unet": unet},
        requires_safety_checker=False,
    )


BUILDERS = {
    "ddpm": testing.tiny_ddpm,
    "ddim": lambda: DDIMPipeline(unet=unet_2d(), scheduler=DDIMScheduler()),
    "pndm": lambda: PNDMPipeline(unet=unet_2d(), scheduler=PNDMScheduler()),
    "ldm-text": testing.tiny_ldm,
    "ldm": lambda: LDMPipeline(vqvae=vq_model(), unet=unet_2d(), scheduler=DDIMScheduler()),
    "score-sde-ve": lambda: ScoreSdeVePipeline(unet=unet_2d(), scheduler=ScoreSdeVeScheduler()),
    "score-sde-vp": lambda: ScoreSdeVpPipeline(unet=unet_2d(), scheduler=ScoreSdeVpScheduler()),
    "karras-ve": lambda: KarrasVePipeline(unet=unet_2d(), scheduler=KarrasVeScheduler()),
    "dance-diffusion": testing.tiny_dance_diffusion,
    "sd": testing.tiny_stable_diffusion,
    "sd-inpaint": inpaint,
    "sdxl": testing.tiny_stable_diffusion_xl,
    "sd3": testing.tiny_stable_diffusion_3,
    "flux": testing.tiny_flux,
    "pixart-sigma": testing.tiny_pixart_sigma,
}


def build(name):
    """Returns a pipeline whose weights depend on nothing but its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        pipeline = BUILDERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained does it; T5 has dropout
    return pipeline
