"""Perturbed attention guidance: its processors read the meaning of a row from its place."""

from families import stable_diffusion as sd
from families.family import IMAGE, Family, Variant

WHY = "its attention processors cut the batch into thirds"
PAG = {"pag_scale": 3.0}

FAMILY = Family(
    "Stable Diffusion PAG",
    make=sd.make,
    arguments=PAG,
    classes={
        "StableDiffusionPAGPipeline": {},
        "StableDiffusionPAGImg2ImgPipeline": sd.IMG2IMG,
        "StableDiffusionPAGInpaintPipeline": sd.INPAINT,
        "StableDiffusionControlNetPAGPipeline": Variant({"image": IMAGE}, sd.controlnet),
        "StableDiffusionControlNetPAGInpaintPipeline": Variant(
            {**sd.INPAINT, **sd.CONTROL}, sd.controlnet
        ),
    },
    alone=WHY,
)
