"""HunyuanVideo."""

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)

from families import parts
from families.family import Family


def make():
    tokenizer, clip = parts.qwen_tokenizer(), parts.clip_of_77_tokens()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.llama(tokenizer),
        "tokenizer_2": clip["tokenizer"],
        "text_encoder_2": clip["text_encoder"],
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(2, 4, 4),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


FAMILY = Family(
    "HunyuanVideo",
    make=make,
    arguments={
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "max_sequence_length": 32,
        "prompt_template": {"template": "{}", "crop_start": 0},
    },
    classes={"HunyuanVideoPipeline": {}},
)
