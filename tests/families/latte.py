"""Latte."""

from diffusers import DDIMScheduler, LatteTransformer3DModel

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from bentoml_diffusers.testing.unets import tiny_vae
from families.family import Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "vae": tiny_vae(),
        "transformer": LatteTransformer3DModel(
            sample_size=4,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            video_length=2,
        ),
        "scheduler": DDIMScheduler(),
    }


FAMILY = Family(
    "Latte",
    make=make,
    arguments={"height": 32, "width": 32, "video_length": 2, "clean_caption": False},
    most=2,
    without={"seeds": "diffusers' own call of two videos mixes them"},
    classes={"LattePipeline": {}},
)
