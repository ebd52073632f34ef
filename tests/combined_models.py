"""Tiny pipelines that hold pipelines: a prior and a decoder, each with its scheduler."""

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from bentoml_diffusers import testing

_WIDTH = 16


def tiny_kandinsky():
    """Returns a Kandinsky 2.2 whose prior makes image embeddings for its decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = KandinskyV22CombinedPipeline(**_prior_parts(), **_decoder_parts())
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_kandinsky_prior():
    """Returns a Kandinsky 2.2 prior, which makes embeddings and nothing to look at."""
    parts = {name.removeprefix("prior_"): part for name, part in _prior_parts().items()}
    return KandinskyV22PriorPipeline(**parts)


def _prior_parts():
    tokenizer = testing.tiny_tokenizer()
    text = CLIPTextConfig(
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=_WIDTH,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=_WIDTH,
        image_size=32,
        patch_size=16,
    )
    size = {"height": 32, "width": 32}
    return {
        "prior_prior": PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            embedding_dim=_WIDTH,
            num_layers=1,
            num_embeddings=tokenizer.model_max_length,
        ),
        "prior_image_encoder": CLIPVisionModelWithProjection(vision),
        "prior_text_encoder": CLIPTextModelWithProjection(text),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample=True,
            clip_sample_range=5.0,
        ),
        "prior_image_processor": CLIPImageProcessorPil(size=size, crop_size=size),
    }


def _decoder_parts():
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=_WIDTH,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": unet, "scheduler": DDPMScheduler(), "movq": movq}
