"""Tokenizers, text and image encoders and autoencoders that several families have."""

from typing import Any

import torch
import transformers

_WORDS = ("a", "red", "green", "blue", "circle", "square", "star", "on", "the", "left")
WIDTH = 16
LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _bytes() -> list[str]:
    """The 256 signs that stand for bytes in byte-level tokenizers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in plain]
    return [chr(code) for code in plain] + [chr(256 + place) for place in range(len(others))]


def qwen_tokenizer(*special: str) -> transformers.Qwen2Tokenizer:
    """Returns a byte-level tokenizer without merges, as those of Qwen, Mistral and SmolLM."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    pieces = [*names, *_bytes()]
    made = transformers.Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]
    )
    made.add_special_tokens({"additional_special_tokens": names[1:]})
    made.padding_side = "left"
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """Returns a tokenizer of letters as Gemma and Llama have it."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    pieces = [*names, *(chr(code) for code in range(33, 127)), "\n"]
    return transformers.GemmaTokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]
    )


def bert_tokenizer() -> transformers.BertTokenizer:
    """Returns a tokenizer of a few words."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*names, *_WORDS]
    return transformers.BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})


def bert(tokenizer: Any) -> Any:
    """Returns an encoder of shape (n, tokens, WIDTH)."""
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **LAYERS)
    ).eval()


def gemma(tokenizer: Any, width: int = WIDTH) -> Any:
    """Returns a Gemma 2 without its head."""
    config = {**LAYERS, "hidden_size": width}
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=2, **config
        )
    )


def vision(size: int = 32, projection: int = WIDTH) -> transformers.CLIPVisionModelWithProjection:
    """Returns an image encoder with embeddings of shape (n, projection)."""
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            **LAYERS, projection_dim=projection, image_size=size, patch_size=size // 4
        )
    )


def image_processor(size: int = 32) -> Any:
    """Returns what brings an image into the form of :func:`vision`."""
    sides = {"height": size, "width": size}
    return transformers.CLIPImageProcessorPil(size=sides, crop_size=sides)


def wan_vae(**more: Any) -> Any:
    """Returns the autoencoder of Wan: 8 times smaller, 4 times fewer frames."""
    from diffusers import AutoencoderKLWan

    config = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(temperal_downsample=[False, True, True], **config, **more)


def qwen_vae(**more: Any) -> Any:
    """Returns the autoencoder of Qwen-Image: 8 times smaller, 4 channels."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **more,
    )


def umt5(tokenizer: Any) -> Any:
    """Returns the text encoder of Wan, of shape (n, tokens, WIDTH)."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
    )


def embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns text that is already encoded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
