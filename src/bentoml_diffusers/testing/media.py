"""Tiny pipelines that make video and audio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.testing.seeding import seeded
from bentoml_diffusers.testing.text import MAX_TOKENS, tiny_t5, tiny_t5_tokenizer

if TYPE_CHECKING:
    from diffusers import LTX2Pipeline, LTXPipeline, StableAudioPipeline
    from transformers import GemmaTokenizer

_WIDTH = 16
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


@seeded
def tiny_ltx(seed: int = 0) -> LTXPipeline:  # noqa: ARG001 - see seeded
    """Returns an LTX-Video for sides that are multiples of 4 and 1, 5, 9 ... frames."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer = tiny_t5_tokenizer()
    halved = (True, True, False, False)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=halved,
            decoder_spatio_temporal_scaling=halved,
            patch_size=1,
        ),
        text_encoder=tiny_t5(tokenizer, width=_WIDTH),
        tokenizer=tokenizer,
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            cross_attention_dim=_WIDTH,
            caption_channels=_WIDTH,
            num_layers=1,
            **_HEADS,
        ),
    )


@seeded
def tiny_ltx2(seed: int = 0) -> LTX2Pipeline:  # noqa: ARG001
    """Returns an LTX-2, which makes video with sound of 8000 Hz; give max_sequence_length=16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
    from diffusers.models import LTX2VideoTransformer3DModel

    tokenizer = _tiny_gemma_tokenizer()
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_tiny_gemma(tokenizer),
        tokenizer=tokenizer,
        connectors=_tiny_connectors(),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            cross_attention_dim=_WIDTH,
            caption_channels=_WIDTH,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            rope_double_precision=False,
            rope_type="split",
            **_HEADS,
        ),
        **_tiny_ltx2_decoders(),
    )


@seeded
def tiny_stable_audio(seed: int = 0) -> StableAudioPipeline:  # noqa: ARG001
    """Returns a Stable Audio for stereo sound of 8000 Hz and up to one second."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
    )
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    tokenizer = tiny_t5_tokenizer()
    tokenizer.model_max_length = MAX_TOKENS
    return StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=8000,
        ),
        text_encoder=tiny_t5(tokenizer, width=_WIDTH),
        tokenizer=tokenizer,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=_WIDTH, conditioning_dim=8, min_value=0, max_value=32
        ),
        transformer=StableAudioDiTModel(
            sample_size=1000,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_key_value_attention_heads=2,
            cross_attention_dim=8,
            cross_attention_input_dim=8,
            time_proj_dim=8,
            global_states_input_dim=_WIDTH,
            **_HEADS,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    )


def _tiny_ltx2_decoders() -> dict[str, Any]:
    """What makes frames and samples of the latents."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    return {
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=16,
        ),
        "vocoder": LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            upsample_kernel_sizes=[20, 16],
            upsample_factors=[10, 8],  # of 100 frames of its spectrogram per second
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=8000,
        ),
    }


def _tiny_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=_WIDTH,
        text_proj_in_factor=3,  # hidden states of the text encoder
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **{
            f"{name}_connector_{key}": value
            for name in ("video", "audio")
            for key, value in {
                **_HEADS,
                "num_layers": 1,
                "num_learnable_registers": None,
            }.items()
        },
    )


def _tiny_gemma_tokenizer() -> GemmaTokenizer:
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    pieces = [*special, *(chr(code) for code in range(33, 127)), "\n"]
    return GemmaTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[])


def _tiny_gemma(tokenizer: GemmaTokenizer) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    size, images = len(tokenizer), 3  # token ids of images, behind the others
    layers = {"hidden_size": _WIDTH, "intermediate_size": _WIDTH, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            **layers,
            "vocab_size": size + images,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**layers, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=size,
        boi_token_index=size + 1,
        eoi_token_index=size + 2,
    )
    return Gemma3ForConditionalGeneration(config).eval()
