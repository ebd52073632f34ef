"""CogView 3 Plus."""

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
)

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
        "transformer": CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        "scheduler": CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
        ),
    }


FAMILY = Family(
    "CogView",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 16},
    classes={"CogView3PlusPipeline": {}},
)
