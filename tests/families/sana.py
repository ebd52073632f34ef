"""Sana, and its perturbed attention guidance."""

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)

from families import parts
from families.family import Family, Variant
from families.stable_diffusion_pag import PAG, WHY


def autoencoder():
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def transformer(**more):
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
        **more,
    )


def make():
    tokenizer = parts.gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.gemma(tokenizer),
        "vae": autoencoder(),
        "transformer": transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


FAMILY = Family(
    "Sana",
    make=make,
    arguments={
        "height": 32,
        "width": 32,
        "max_sequence_length": 24,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "clean_caption": False,
    },
    classes={
        "SanaPipeline": {},
        "SanaPAGPipeline": Variant(
            PAG, lambda parts: {"scheduler": DPMSolverMultistepScheduler()}, alone=WHY
        ),
    },
)
