"""Sana Sprint."""

from diffusers import SCMScheduler

from families import sana
from families import stable_diffusion as sd
from families.family import Family


def make():
    return {
        **sana.make(),
        "transformer": sana.transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        "scheduler": SCMScheduler(),
    }


FAMILY = Family(
    "Sana Sprint",
    make=make,
    arguments={**sana.FAMILY.arguments, "num_inference_steps": 2},
    classes={"SanaSprintPipeline": {}, "SanaSprintImg2ImgPipeline": sd.IMG2IMG},
)
