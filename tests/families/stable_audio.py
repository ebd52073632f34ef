"""Stable Audio."""

from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioProjectionModel,
)

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families.family import Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    tokenizer.model_max_length = 16
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "vae": AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        "transformer": StableAudioDiTModel(
            sample_size=4,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=4, min_value=0, max_value=32
        ),
        "scheduler": EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0
        ),
    }


FAMILY = Family("Stable Audio", make=make, classes={"StableAudioPipeline": {}})
