"""Stable Diffusion XL, and its perturbed attention guidance."""

from diffusers import ControlNetModel

from bentoml_diffusers import testing
from families import stable_diffusion as sd
from families.family import IMAGE, Family, Variant


def make():
    return {**testing.tiny_stable_diffusion_xl().components, "add_watermarker": False}


def controlnet(parts):
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    return {"controlnet": net}


FAMILY = Family(
    "Stable Diffusion XL",
    make=make,
    classes={
        "StableDiffusionXLPipeline": {},
        "StableDiffusionXLImg2ImgPipeline": sd.IMG2IMG,
        "StableDiffusionXLInpaintPipeline": sd.INPAINT,
        "StableDiffusionXLControlNetPipeline": Variant({"image": IMAGE}, controlnet),
        "StableDiffusionXLControlNetImg2ImgPipeline": Variant(
            {**sd.IMG2IMG, **sd.CONTROL}, controlnet
        ),
        "StableDiffusionXLControlNetInpaintPipeline": Variant(
            {**sd.INPAINT, **sd.CONTROL}, controlnet
        ),
        "StableDiffusionXLInstructPix2PixPipeline": Variant(
            {"image": IMAGE, "height": 32, "width": 32}, sd.unet_of(8)
        ),
    },
    quick=("StableDiffusionXLPipeline",),
)
