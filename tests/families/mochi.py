"""Mochi."""

from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families.family import Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer, width=32),
        "vae": AutoencoderKLMochi(
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "transformer": MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }


FAMILY = Family(
    "Mochi",
    make=make,
    arguments={"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16},
    classes={"MochiPipeline": {}},
)
