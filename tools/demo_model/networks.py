"""The parts of the demo model, and its tokenizer, as empty networks of the real classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_WIDTH = 128
MAX_TOKENS = 32
LATENT_CHANNELS = 4


def build_vae() -> AutoencoderKL:
    """Returns an autoencoder from (3, 64, 64) images to (4, 16, 16) latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def build_unet(*, pooled_text: bool) -> UNet2DConditionModel:
    """Returns a denoiser of (4, 16, 16) latents that predicts v.

    With ``pooled_text`` the prompt reaches it twice: by cross-attention, and pooled to one vector
    that is added to the embedding of the time step. Without it, 1000 steps taught nothing about
    places and little about shapes.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text" if pooled_text else None,
        addition_embed_type_num_heads=4,
    )


def add_pooled_text(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Returns the denoiser with pooled text; where that is new, it changes predictions a little."""
    if unet.config.addition_embed_type == "text":
        return unet
    larger = build_unet(pooled_text=True)
    missing, unexpected = larger.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("add_embedding.") for name in missing)
    torch.nn.init.constant_(larger.add_embedding.norm2.weight, 0.5)
    return larger


@torch.no_grad()
def refresh_words(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    words: Sequence[str],
    length: float | None = None,
) -> None:
    """Gives ``words`` new random embeddings of a length, by default twice that of the longest one.

    The training of colours drowns words that matter less at first: after 1000 steps, ``left`` and
    ``right`` differed by 3 % of the length of a hidden state, and nothing was learnt from them.
    """
    if not words:
        return
    weight = text_encoder.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids([word + "</w>" for word in words])
    fresh = torch.nn.functional.normalize(torch.randn(len(words), weight.shape[1]), dim=1)
    weight[rows] = fresh * (2 * weight.norm(dim=1).max() if length is None else length)


def build_text_encoder(vocabulary_size: int, end_of_text: int) -> CLIPTextModel:
    """Returns a CLIP text encoder of two layers; its last hidden state has shape (32, 128)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=end_of_text - 1,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    )


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Returns a CLIP tokenizer in which each of ``words`` is one token, all else letters.

    Merges grow from the end of a word: each of them needs the end mark, so that no merge of one
    word can break another. ``vocab`` and ``merges`` are given as values: transformers 5 ignores
    the files (``vocab_file=``) without a word.
    """
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[-2], symbols[-1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            symbols[-2:] = ["".join(pair)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
