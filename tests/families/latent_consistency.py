"""Latent consistency models."""

from diffusers import LCMScheduler, UNet2DConditionModel

from families import stable_diffusion as sd
from families.family import Family, config_of


def make():
    known = sd.make()
    config = config_of(known["unet"], time_cond_proj_dim=8)
    return {**known, "unet": UNet2DConditionModel(**config), "scheduler": LCMScheduler()}


FAMILY = Family(
    "Latent Consistency",
    make=make,
    classes={
        "LatentConsistencyModelPipeline": {},
        "LatentConsistencyModelImg2ImgPipeline": sd.IMG2IMG,
    },
)
