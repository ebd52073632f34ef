"""Stable Diffusion 3, and its perturbed attention guidance."""

from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel

from bentoml_diffusers import testing
from families import stable_diffusion as sd
from families.family import IMAGE, Family, Variant, config_of
from families.stable_diffusion_pag import PAG, WHY

GLOBAL_NOISE = "diffusers' own call makes another image each time: some noise has no generator"
SIZE = {"height": 32, "width": 32, "max_sequence_length": 24}


def make():
    return dict(testing.tiny_stable_diffusion_3().components)


def sixteen_channels(parts):
    """Inpainting takes no others."""
    vae = AutoencoderKL(**config_of(parts["vae"], latent_channels=16))
    config = config_of(parts["transformer"], in_channels=16, out_channels=16)
    return {"vae": vae, "transformer": SD3Transformer2DModel(**config)}


def controlnet(parts):
    net = SD3ControlNetModel.from_transformer(
        parts["transformer"],
        num_layers=1,
        num_extra_conditioning_channels=0,
        load_weights_from_transformer=False,
    )
    return {"controlnet": net}


FAMILY = Family(
    "Stable Diffusion 3",
    make=make,
    arguments=SIZE,
    classes={
        "StableDiffusion3Pipeline": {},
        "StableDiffusion3Img2ImgPipeline": sd.IMG2IMG,
        "StableDiffusion3InpaintPipeline": Variant(sd.INPAINT, sixteen_channels),
        "StableDiffusion3ControlNetPipeline": Variant(
            {"control_image": IMAGE},
            controlnet,
            without=dict.fromkeys(("runs", "store", "lora"), GLOBAL_NOISE),
        ),
        "StableDiffusion3PAGPipeline": Variant(PAG, alone=WHY),
        "StableDiffusion3PAGImg2ImgPipeline": Variant({**PAG, **sd.IMG2IMG}, alone=WHY),
    },
    quick=("StableDiffusion3Pipeline",),
)
