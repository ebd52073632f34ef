"""Tiny pipelines whose denoiser is a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers.testing.seeding import seeded
from bentoml_diffusers.testing.text import (
    tiny_clip,
    tiny_clip_with_projection,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)
from bentoml_diffusers.testing.unets import tiny_vae

if TYPE_CHECKING:
    from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline


@seeded
def tiny_stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:  # noqa: ARG001 - see seeded
    """Returns an SD3 with its three text encoders, for images of 32 x 32 pixels."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    clip, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=40,
            pooled_projection_dim=16 + 24,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift=0.1),
        text_encoder=tiny_clip_with_projection(clip),
        tokenizer=clip,
        text_encoder_2=tiny_clip_with_projection(clip, width=24),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(t5, width=40),
        tokenizer_3=t5,
    )


@seeded
def tiny_flux(seed: int = 0) -> FluxPipeline:  # noqa: ARG001
    """Returns a Flux with embedded guidance, for images of 32 x 32 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift=0.1),
        text_encoder=tiny_clip(clip),
        tokenizer=clip,
        text_encoder_2=tiny_t5(t5, width=32),
        tokenizer_2=t5,
    )


@seeded
def tiny_pixart_sigma(seed: int = 0) -> PixArtSigmaPipeline:  # noqa: ARG001
    """Returns a PixArt-Sigma for images of 32 x 32 pixels."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    tokenizer = tiny_t5_tokenizer()
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=4,
            num_layers=2,
            patch_size=1,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=32,
            norm_num_groups=1,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
        vae=tiny_vae(),
        text_encoder=tiny_t5(tokenizer, width=32),
        tokenizer=tokenizer,
    )
