"""LTX-Video."""

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families.family import IMAGE, Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "vae": vae,
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


FAMILY = Family(
    "LTX-Video",
    make=make,
    arguments={"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 24},
    classes={
        "LTXPipeline": {},
        "LTXImageToVideoPipeline": {"image": IMAGE},
        "LTXConditionPipeline": {"image": IMAGE},
    },
    quick=("LTXPipeline",),
)
