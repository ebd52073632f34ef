"""Flux."""

from diffusers import FluxControlNetModel, FluxTransformer2DModel

from bentoml_diffusers import testing
from families import stable_diffusion as sd
from families.family import IMAGE, MASK, Family, Variant, config_of


def make():
    return dict(testing.tiny_flux().components)


def fill(parts):
    """It reads the image and the mask beside the latents."""
    channels = 16 + 16 + 256
    config = config_of(parts["transformer"], in_channels=channels, out_channels=16)
    return {"transformer": FluxTransformer2DModel(**config)}


def control(parts):
    config = config_of(parts["transformer"], in_channels=32, out_channels=16)
    return {"transformer": FluxTransformer2DModel(**config)}


def controlnet(parts):
    config = config_of(parts["transformer"])
    del config["out_channels"]
    return {"controlnet": FluxControlNetModel(**config)}


FAMILY = Family(
    "Flux",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 24},
    classes={
        "FluxPipeline": {},
        "FluxImg2ImgPipeline": sd.IMG2IMG,
        "FluxInpaintPipeline": sd.INPAINT,
        "FluxFillPipeline": Variant({"image": IMAGE, "mask_image": MASK}, fill),
        "FluxControlPipeline": Variant({"control_image": IMAGE}, control),
        "FluxControlImg2ImgPipeline": Variant({**sd.IMG2IMG, "control_image": IMAGE}, control),
        "FluxControlNetPipeline": Variant({"control_image": IMAGE}, controlnet),
        "FluxControlNetImg2ImgPipeline": Variant(
            {**sd.IMG2IMG, "control_image": IMAGE}, controlnet
        ),
        "FluxControlNetInpaintPipeline": Variant(
            {**sd.INPAINT, "control_image": IMAGE}, controlnet
        ),
        "FluxKontextPipeline": {"image": IMAGE, "max_area": 32 * 32, "_auto_resize": False},
        "FluxKontextPipeline (no image)": {"max_area": 32 * 32},
    },
    quick=("FluxPipeline",),
)
