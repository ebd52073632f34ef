"""Stable Diffusion 1 and 2."""

from diffusers import UNet2DConditionModel

from bentoml_diffusers import testing
from families.family import IMAGE, MASK, Family, Variant, config_of


def make():
    pipeline = testing.tiny_stable_diffusion()
    return {**pipeline.components, "requires_safety_checker": False}


def controlnet(parts):
    return {"controlnet": testing.tiny_controlnet().controlnet}


def unet_of(channels):
    """A UNet that also reads further latents at each step."""

    def make_unet(parts):
        return {"unet": UNet2DConditionModel(**config_of(parts["unet"], in_channels=channels))}

    return make_unet


IMG2IMG = {"image": IMAGE, "strength": 0.8}
INPAINT = {**IMG2IMG, "mask_image": MASK, "height": 32, "width": 32}
CONTROL = {"control_image": IMAGE}

FAMILY = Family(
    "Stable Diffusion",
    make=make,
    classes={
        "StableDiffusionPipeline": {},
        "StableDiffusionImg2ImgPipeline": IMG2IMG,
        "StableDiffusionInpaintPipeline": INPAINT,
        "StableDiffusionControlNetPipeline": Variant({"image": IMAGE}, controlnet),
        "StableDiffusionControlNetImg2ImgPipeline": Variant({**IMG2IMG, **CONTROL}, controlnet),
        "StableDiffusionControlNetInpaintPipeline": Variant({**INPAINT, **CONTROL}, controlnet),
        "StableDiffusionInstructPix2PixPipeline": Variant({"image": IMAGE}, unet_of(8)),
    },
    quick=("StableDiffusionPipeline",),
)
