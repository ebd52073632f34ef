"""Stable Diffusion 1 and 2."""

from diffusers import DDPMScheduler, MultiControlNetModel, UNet2DConditionModel

from bentoml_diffusers import testing
from families.family import IMAGE, MASK, OTHER_IMAGE, Family, Variant, config_of
from families.parts import image_processor, vision


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


def upscaler(parts):
    """Its UNet reads the small image, and how much noise it has."""
    config = config_of(parts["unet"], in_channels=7, num_class_embeds=100)
    return {"unet": UNet2DConditionModel(**config), "low_res_scheduler": DDPMScheduler()}


def two_controlnets(parts):
    nets = [testing.tiny_controlnet(seed).controlnet for seed in (0, 1)]
    return {"controlnet": MultiControlNetModel(nets)}


def variation(parts):
    return {"image_encoder": vision(), "feature_extractor": image_processor()}


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
        "StableDiffusionControlNetPipeline (two nets)": Variant(
            {"image": [IMAGE, OTHER_IMAGE]}, two_controlnets
        ),
        "StableDiffusionUpscalePipeline": Variant({"image": IMAGE.resize((8, 8))}, upscaler),
        "StableDiffusionImageVariationPipeline": Variant(
            {"image": IMAGE, "height": 32, "width": 32, "prompt": None}, variation
        ),
        "StableDiffusionInstructPix2PixPipeline": Variant({"image": IMAGE}, unet_of(8)),
    },
    quick=("StableDiffusionPipeline",),
)
