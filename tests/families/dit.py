"""DiT and consistency models: images of a class."""

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)

from bentoml_diffusers.testing.unets import tiny_vae
from families.family import Family, Variant


def make():
    return {
        "transformer": DiTTransformer2DModel(
            sample_size=4,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        "vae": tiny_vae(),
        "scheduler": DDIMScheduler(),
    }


def consistency(known):
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=4,
        num_class_embeds=10,
    )
    return {"unet": unet, "scheduler": CMStochasticIterativeScheduler()}


FAMILY = Family(
    "DiT",
    make=make,
    prompts=(),
    classes={
        "DiTPipeline": {"class_labels": [1]},
        "ConsistencyModelPipeline": Variant({"class_labels": 1}, consistency),
    },
)
