"""Lumina 2."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
)

from bentoml_diffusers.testing.unets import tiny_vae
from families import parts
from families.family import Family


def make():
    tokenizer = parts.gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.gemma(tokenizer),
        "vae": tiny_vae(shift=0.1),
        "transformer": Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(256, 32, 32),
            cap_feat_dim=parts.WIDTH,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


FAMILY = Family(
    "Lumina",
    make=make,
    arguments={"height": 32, "width": 32},
    classes={
        "Lumina2Pipeline": {},
    },
)
