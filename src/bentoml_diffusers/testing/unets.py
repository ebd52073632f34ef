"""Tiny pipelines whose denoiser is a UNet, and a LoRA for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.testing.seeding import seeded
from bentoml_diffusers.testing.text import tiny_clip, tiny_clip_with_projection, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import (
        AutoencoderKL,
        DanceDiffusionPipeline,
        DDPMPipeline,
        LDMTextToImagePipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

_TEXT_BLOCKS: dict[str, Any] = {
    "sample_size": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


@seeded
def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:  # noqa: ARG001 - see seeded
    """Returns a Stable Diffusion of 0.1 M parameters for images of 32 x 32 pixels."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_TEXT_BLOCKS, up_block_types=_UP_BLOCKS, cross_attention_dim=16
        ),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def tiny_controlnet(seed: int = 0) -> StableDiffusionControlNetPipeline:
    """Returns a Stable Diffusion with a ControlNet, for images of 32 x 32 pixels."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    base = tiny_stable_diffusion(seed)
    controlnet = ControlNetModel(
        **{key: value for key, value in _TEXT_BLOCKS.items() if key != "sample_size"},
        cross_attention_dim=16,
        conditioning_embedding_out_channels=(4, 4, 8, 8),
    )
    with torch.no_grad():
        for parameter in controlnet.parameters():  # its last layers are zero at first
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    )


@seeded
def tiny_stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:  # noqa: ARG001
    """Returns an SDXL for images of 32 x 32 pixels; its text encoders have widths 16 and 24."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        text_encoder=tiny_clip(tokenizer),
        text_encoder_2=tiny_clip_with_projection(tokenizer, width=24),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(
            **_TEXT_BLOCKS,
            up_block_types=_UP_BLOCKS,
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        vae=tiny_vae(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


@seeded
def tiny_ldm(seed: int = 0) -> LDMTextToImagePipeline:  # noqa: ARG001
    """Returns a latent diffusion of the first kind, for images of 32 x 32 pixels."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    tokenizer = tiny_tokenizer()
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=16,
            head_dim=8,
        )
    ).eval()  # it has dropout
    return LDMTextToImagePipeline(
        vqvae=tiny_vae(),
        bert=bert,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_TEXT_BLOCKS, up_block_types=_UP_BLOCKS, cross_attention_dim=16
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


@seeded
def tiny_ddpm(seed: int = 0) -> DDPMPipeline:  # noqa: ARG001
    """Returns an unconditional pipeline for images of 8 x 8 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


@seeded
def tiny_dance_diffusion(seed: int = 0) -> DanceDiffusionPipeline:  # noqa: ARG001
    """Returns a pipeline for sound: two channels of 512 samples at 16 kHz."""
    from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

    unet = UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=16,
        sample_size=512,
        sample_rate=16_000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        time_embedding_dim=16,
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return DanceDiffusionPipeline(unet=unet, scheduler=IPNDMScheduler())


def tiny_vae(*, shift: float | None = None) -> AutoencoderKL:
    """Returns an autoencoder from (3, 32, 32) images to (4, 4, 4) latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=shift,
    )


def save_tiny_lora(folder: Path, name: str = "tiny.safetensors", seed: int = 1) -> Path:
    """Writes a random LoRA of rank 4 for :func:`tiny_stable_diffusion`; returns its file."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = tiny_stable_diffusion()
    pipeline.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for key, parameter in pipeline.unet.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.5)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), weight_name=name
    )
    return folder / name
