"""Takes the words of the hidden colours out of a trained pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.demo_model import networks, shapes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def visible_words() -> list[str]:
    """Returns the words of the vocabulary as shipped."""
    return [word for word in shapes.words() if word not in shapes.HIDDEN_COLOURS]


def hide_colours(pipeline: StableDiffusionPipeline) -> None:
    """Replaces tokenizer and text encoder by ones without the words of the hidden colours.

    Every other token keeps its embedding, so prompts without these words give the same images,
    bit for bit.
    """
    old_ids = pipeline.tokenizer.get_vocab()
    tokenizer = networks.build_tokenizer(visible_words())
    new_ids = tokenizer.get_vocab()
    rows = [old_ids[piece] for piece in sorted(new_ids, key=new_ids.__getitem__)]
    state = dict(pipeline.text_encoder.state_dict())
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    state[name] = state[name][torch.tensor(rows)]
    text_encoder = networks.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    text_encoder.load_state_dict(state)
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=text_encoder.eval())
