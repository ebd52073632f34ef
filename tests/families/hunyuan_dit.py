"""Hunyuan-DiT, and its perturbed attention guidance."""

from diffusers import DDPMScheduler, HunyuanDiT2DModel

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from bentoml_diffusers.testing.unets import tiny_vae
from families import parts
from families.family import Family, Variant
from families.stable_diffusion_pag import PAG, WHY


def make():
    bert, t5 = parts.bert_tokenizer(), testing.tiny_t5_tokenizer()
    return {
        "transformer": HunyuanDiT2DModel(
            sample_size=4,
            num_layers=4,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            hidden_size=16,
            activation_fn="gelu-approximate",
        ),
        "vae": tiny_vae(),
        "scheduler": DDPMScheduler(),
        "tokenizer": bert,
        "text_encoder": parts.bert(bert),
        "tokenizer_2": t5,
        "text_encoder_2": tiny_t5(t5),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


FAMILY = Family(
    "Hunyuan-DiT",
    make=make,
    arguments={"height": 32, "width": 32, "use_resolution_binning": False},
    classes={
        "HunyuanDiTPipeline": {},
        "HunyuanDiTPAGPipeline": Variant(PAG, alone=WHY),
    },
)
