"""Pipelines that are given nothing but a seed."""

from diffusers import DDIMScheduler, VQModel

from bentoml_diffusers import testing
from families.family import Family, Variant


def make():
    pipeline = testing.tiny_ddpm()
    return dict(pipeline.components)


def ldm(parts):
    vqvae = VQModel(
        latent_channels=3,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )
    return {"vqvae": vqvae, "scheduler": DDIMScheduler()}


FAMILY = Family(
    "Unconditional",
    make=make,
    prompts=(),
    classes={
        "DDPMPipeline": {},
        "DDIMPipeline": Variant(parts=lambda parts: {"scheduler": DDIMScheduler()}),
        "LDMPipeline": Variant(parts=ldm),
        "DanceDiffusionPipeline": Variant(
            {"audio_length_in_s": 512 / 16_000},
            lambda parts: dict(testing.tiny_dance_diffusion().components),
        ),
        "LDMTextToImagePipeline": Variant(
            {"prompt": "a red circle"}, lambda parts: dict(testing.tiny_ldm().components)
        ),
    },
    quick=("DDPMPipeline",),
)
