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


def qwen_vl(tokenizer: Any) -> Any:
    """Returns a Qwen 2.5 VL; its image tokens are those of :func:`qwen_vl_tokenizer`."""
    vocabulary = tokenizer.get_vocab()
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    text = {**LAYERS, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_scaling": rope}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
            },
            **{key: vocabulary[name] for key, name in names.items()},
        )
    )


def qwen_vl_tokenizer() -> Any:
    """Returns a tokenizer that knows the places of images."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return qwen_tokenizer(*names)


class QwenProcessor:
    """Prepares images and text for :func:`qwen_vl`, as transformers' own does with torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
        self.image_processor = transformers.Qwen2VLImageProcessorPil(size=size)

    def __call__(self, text: Any, images: Any = None, **options: Any) -> Any:
        """Returns tokens and patches; an image fills as many places as it has patches."""
        if images is None:
            return self.tokenizer(text, **options)
        patches = self.image_processor(images=images, return_tensors="pt")
        for grid in patches["image_grid_thw"]:
            places = int(grid.prod()) // self.image_processor.merge_size**2
            text = [one.replace("<|image_pad|>", "<|place|>" * places, 1) for one in text]
        text = [one.replace("<|place|>", "<|image_pad|>") for one in text]
        return transformers.BatchFeature({**self.tokenizer(text, **options), **patches})


def clip_of_77_tokens() -> dict[str, Any]:
    """Returns a CLIP text encoder and its tokenizer, for pipelines that pad to 77 tokens."""
    from bentoml_diffusers import testing

    tokenizer = testing.tiny_tokenizer()
    tokenizer.model_max_length = 77
    end = tokenizer.eos_token_id
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        projection_dim=WIDTH,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        **LAYERS,
    )
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config)}


def qwen3(tokenizer: Any) -> Any:
    """Returns a Qwen 3 without its head."""
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **LAYERS
        )
    )


def qwen3_for_causal_lm(tokenizer: Any) -> Any:
    """Returns a Qwen 3 with its head."""
    return transformers.Qwen3ForCausalLM(qwen3(tokenizer).config)


def llama(tokenizer: Any) -> Any:
    """Returns a Llama without its head."""
    return transformers.LlamaModel(
        transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **LAYERS)
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
