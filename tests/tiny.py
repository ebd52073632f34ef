"""Tiny pipelines of the classes that the documentation names, with random weights."""

import torch
from diffusers import (
    AutoencoderKL,
    DanceDiffusionPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IPNDMScheduler,
    KarrasVePipeline,
    KarrasVeScheduler,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMPipeline,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from diffusers.schedulers import ScoreSdeVpScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from bentoml_diffusers import testing
from bentoml_diffusers.loading.score_sde_vp import ScoreSdeVpPipeline


def unet_2d(channels=3, **more):
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **more,
    )


def unet_condition(**more):
    return UNet2DConditionModel(
        **{
            "sample_size": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **more,
        }
    )


def vq_model():
    return VQModel(
        in_channels=3,
        out_channels=3,
        latent_channels=3,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )


def vae(channels=4):
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=0.1,
        scaling_factor=1.0,
    )


def clip_config(tokenizer, width=16):
    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )


def t5(width=16):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(97, 123)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def stable_diffusion_xl():
    tokenizer = testing.tiny_tokenizer()
    unet = unet_condition(
        cross_attention_dim=16 + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 16,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, width=32)),
        tokenizer=tokenizer,
        tokenizer_2=testing.tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def stable_diffusion_3():
    tokenizer = testing.tiny_tokenizer()
    t5_tokenizer, t5_model = t5(32)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer_2=testing.tiny_tokenizer(),
        text_encoder_3=t5_model,
        tokenizer_3=t5_tokenizer,
    )


def flux():
    tokenizer = testing.tiny_tokenizer()
    t5_tokenizer, t5_model = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5_model,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def pixart_sigma():
    tokenizer, model = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=4,
        num_layers=1,
        patch_size=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        norm_num_groups=1,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=model,
        vae=vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def dance_diffusion():
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


def ldm_text_to_image():
    tokenizer = testing.tiny_tokenizer()
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=16,
        )
    )
    return LDMTextToImagePipeline(
        vqvae=vae(),
        bert=bert,
        tokenizer=tokenizer,
        unet=unet_condition(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


def inpaint():
    base = testing.tiny_stable_diffusion()
    return StableDiffusionInpaintPipeline(
        **{**base.components, "unet": unet_condition(in_channels=9)},
        requires_safety_checker=False,
    )


BUILDERS = {
    "ddpm": testing.tiny_ddpm,
    "ddim": lambda: DDIMPipeline(unet=unet_2d(), scheduler=DDIMScheduler()),
    "pndm": lambda: PNDMPipeline(unet=unet_2d(), scheduler=PNDMScheduler()),
    "ldm-text": ldm_text_to_image,
    "ldm": lambda: LDMPipeline(vqvae=vq_model(), unet=unet_2d(), scheduler=DDIMScheduler()),
    "score-sde-ve": lambda: ScoreSdeVePipeline(unet=unet_2d(), scheduler=ScoreSdeVeScheduler()),
    "score-sde-vp": lambda: ScoreSdeVpPipeline(unet=unet_2d(), scheduler=ScoreSdeVpScheduler()),
    "karras-ve": lambda: KarrasVePipeline(unet=unet_2d(), scheduler=KarrasVeScheduler()),
    "dance-diffusion": dance_diffusion,
    "sd": testing.tiny_stable_diffusion,
    "sd-inpaint": inpaint,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart-sigma": pixart_sigma,
}


def build(name):
    """Returns a pipeline whose weights depend on nothing but its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        pipeline = BUILDERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained does it; T5 has dropout
    return pipeline
