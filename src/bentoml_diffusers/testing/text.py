"""Tokenizers of a few words, and the text encoders that read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5EncoderModel,
        T5Tokenizer,
    )

MAX_TOKENS = 24
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
        model_max_length=MAX_TOKENS,
    )


def tiny_clip(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModel:
    """Returns a CLIP text encoder of two layers; hidden states of shape (n, 24, width)."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(tokenizer, width))


def tiny_clip_with_projection(
    tokenizer: CLIPTokenizer, width: int = 16
) -> CLIPTextModelWithProjection:
    """Returns a CLIP text encoder with pooled embeddings of shape (n, width)."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(tokenizer, width))


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Returns a T5 tokenizer of a few words and all lower-case letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    words = [(f"▁{word}", -1.0) for word in _WORDS]
    letters = [(chr(code), -3.0) for code in range(97, 123)]
    return T5Tokenizer(vocab=[*special, *words, ("▁", -2.0), *letters], extra_ids=0)


def tiny_t5(tokenizer: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    """Returns a T5 encoder of two layers; hidden states of shape (n, tokens, width)."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
