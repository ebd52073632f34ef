"""Perturbed attention guidance of Stable Diffusion XL."""

from families import stable_diffusion as sd
from families import stable_diffusion_xl as sdxl
from families.family import IMAGE, Family, Variant
from families.stable_diffusion_pag import PAG, WHY

FAMILY = Family(
    "Stable Diffusion XL PAG",
    make=sdxl.make,
    arguments=PAG,
    classes={
        "StableDiffusionXLPAGPipeline": {},
        "StableDiffusionXLPAGImg2ImgPipeline": sd.IMG2IMG,
        "StableDiffusionXLPAGInpaintPipeline": sd.INPAINT,
        "StableDiffusionXLControlNetPAGPipeline": Variant({"image": IMAGE}, sdxl.controlnet),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": Variant(
            {**sd.IMG2IMG, **sd.CONTROL}, sdxl.controlnet
        ),
    },
    alone=WHY,
)
