"""Tiny pipelines of real diffusers classes, for our tests and for those of users.

Their weights are random but seeded: pictures mean nothing, yet another prompt, seed or LoRA
gives another picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DDPMPipeline, StableDiffusionPipeline
    from transformers import CLIPTokenizer

_WORDS = ("a", "red", "green", "blue", "circle", "square", "star", "on", "the", "left")


def tiny_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer of a few words and all letters.

    Made from values: transformers 5 ignores ``vocab_file`` without a word.
    """
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in _WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = ["".join(symbols[:2])]
            pieces.append(symbols[0])
    unique = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(unique)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=24,
    )


def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Returns a Stable Diffusion of 0.1 M parameters for pictures of 32 x 32 pixels."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        end = tokenizer.eos_token_id
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        unet = UNet(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_ddpm(seed: int = 0) -> DDPMPipeline:
    """Returns an unconditional pipeline for pictures of 8 x 8 pixels."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


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
