"""FLUX.2 Klein."""

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

from families import parts
from families.family import IMAGE, Family


def make():
    tokenizer = parts.qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.qwen3_for_causal_lm(tokenizer),
        "vae": AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            sample_size=32,
        ),
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * parts.WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


FAMILY = Family(
    "FLUX.2",
    make=make,
    arguments={
        "height": 32,
        "width": 32,
        "max_sequence_length": 64,
        "text_encoder_out_layers": (0, 1, 2),
    },
    classes={
        "Flux2KleinPipeline": {},
        "Flux2KleinPipeline (an image)": {"image": IMAGE.resize((64, 64))},
    },
)
