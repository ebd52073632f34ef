"""Stable Video Diffusion."""

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    UNetSpatioTemporalConditionModel,
)

from families import parts
from families.family import IMAGE, OTHER_IMAGE, Family


def make():
    return {
        "unet": UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=4,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16,
            num_attention_heads=2,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        "vae": AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            latent_channels=4,
        ),
        "image_encoder": parts.vision(224),
        "feature_extractor": parts.image_processor(224),
    }


FAMILY = Family(
    "Stable Video Diffusion",
    make=make,
    prompts=(),
    vary=({"image": IMAGE}, {"image": OTHER_IMAGE}, {"image": IMAGE}),
    arguments={"height": 32, "width": 32, "num_frames": 2, "decode_chunk_size": 2},
    classes={"StableVideoDiffusionPipeline": {}},
)
