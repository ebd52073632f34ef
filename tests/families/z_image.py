"""Z-Image."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from bentoml_diffusers.testing.unets import tiny_vae
from families import parts
from families import stable_diffusion as sd
from families.family import Family, config_of


def make():
    tokenizer = parts.qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.qwen3(tokenizer),
        "vae": AutoencoderKL(**config_of(tiny_vae(shift=0.1), latent_channels=16)),
        "transformer": ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=parts.WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


FAMILY = Family(
    "Z-Image",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 96, "guidance_scale": 3.0},
    classes={
        "ZImagePipeline": {},
        "ZImageImg2ImgPipeline": sd.IMG2IMG,
        "ZImageInpaintPipeline": sd.INPAINT,
    },
    quick=("ZImagePipeline",),
)
