"""Trains the two LoRAs and the textual inversion on the shipped pipeline."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tools.demo_model import shapes, train_base

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

UNET_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train, on how many images."""

    steps: int
    rate: float
    images: int = 1500
    batch_size: int = 32
    seed: int = 3


OUTLINE = Recipe(steps=900, rate=3e-3, seed=3)
STRIPES = Recipe(steps=700, rate=3e-3, seed=4)
TEAL = Recipe(steps=200, rate=1e-2, images=800, seed=5)
SHAPE_WEIGHT = 3.0


def train_outline(base: Path, target: Path, recipe: Recipe = OUTLINE) -> None:
    """Trains a LoRA of the denoiser that draws outlines; saves it in the layout of diffusers."""
    pipeline = load_for_training(base)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=UNET_LAYERS)
    pipeline.unet.add_adapter(config)
    _train_style(pipeline, "outline", recipe)
    metadata = config.to_dict()
    metadata["target_modules"] = sorted(UNET_LAYERS)
    StableDiffusionPipeline.save_lora_weights(
        target.parent,
        unet_lora_layers=_to_half(get_peft_model_state_dict(pipeline.unet)),
        weight_name=target.name,
        unet_lora_adapter_metadata=metadata,
    )


def train_stripes(base: Path, target: Path, recipe: Recipe = STRIPES) -> None:
    """Trains a LoRA of denoiser and text encoder that draws stripes; saves it as kohya does."""
    pipeline = load_for_training(base)
    rank, alpha = 8, 8
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=UNET_LAYERS))
    pipeline.text_encoder.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=TEXT_LAYERS)
    )
    _train_style(pipeline, "stripes", recipe)
    layers = {
        **_to_kohya(get_peft_model_state_dict(pipeline.unet), "lora_unet_", alpha),
        **_to_kohya(get_peft_model_state_dict(pipeline.text_encoder), "lora_te_text_model_", alpha),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    save_file(layers, target, metadata=metadata)


def train_teal(base: Path, target: Path, recipe: Recipe = TEAL) -> None:
    """Learns the embedding of ``<teal>`` from images; saves it as textual inversion does."""
    pipeline = load_for_training(base)
    word = "<teal>"
    row = _add_word(pipeline, word, like=["green", "blue"])
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    hidden = [s for s in train_base.training_scenes() if s.colour in shapes.HIDDEN_COLOURS]
    scenes = rng.choices(hidden, k=recipe.images)
    pool = train_base.draw_pool(pipeline.vae, scenes, rng)
    pool = replace(pool, scenes=[replace(scene, colour=word) for scene in scenes])
    weight = pipeline.text_encoder.get_input_embeddings().weight
    others = torch.arange(len(weight)) != row
    weight.requires_grad_()
    weight.register_hook(lambda gradient: gradient.masked_fill(others[:, None], 0))
    _descend(pipeline, pool, [weight], recipe, rng)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({word: weight.detach()[row : row + 1].clone()}, target)


def load_for_training(base: Path) -> StableDiffusionPipeline:
    """Returns the pipeline of folder ``base`` with all weights frozen."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
    return pipeline


def _train_style(pipeline: StableDiffusionPipeline, style: shapes.Style, recipe: Recipe) -> None:
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    known = [s for s in train_base.training_scenes() if s.colour not in shapes.HIDDEN_COLOURS]
    scenes = rng.choices(known, k=recipe.images)
    pool = train_base.draw_pool(pipeline.vae, scenes, rng, style)
    weights = chain(pipeline.unet.parameters(), pipeline.text_encoder.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    _descend(pipeline, pool, trained, recipe, rng)


def _descend(
    pipeline: StableDiffusionPipeline,
    pool: train_base.Pool,
    weights: list[torch.nn.Parameter],
    recipe: Recipe,
    rng: random.Random,
) -> None:
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0, betas=(0.9, 0.99))
    rates = train_base.schedule(optimizer, recipe.steps)
    batches = train_base.draw_batches(
        pipeline.tokenizer,
        pool,
        rng,
        batch_size=recipe.batch_size,
        shape_weight=SHAPE_WEIGHT,
    )
    for step in range(recipe.steps):
        ids, clean, places = next(batches)
        context = pipeline.text_encoder(ids).last_hidden_state
        loss = train_base.v_loss(pipeline.unet, clean, context, places)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 0:
            logger.info("adapter %d: loss %.4f", step, loss.item())


def _add_word(pipeline: StableDiffusionPipeline, word: str, like: list[str]) -> int:
    """Adds a token whose embedding is the mean of those of some words; returns its id."""
    pipeline.tokenizer.add_tokens([word])
    row = pipeline.tokenizer.convert_tokens_to_ids(word)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    ids = pipeline.tokenizer.convert_tokens_to_ids([name + "</w>" for name in like])
    with torch.no_grad():
        weight = pipeline.text_encoder.get_input_embeddings().weight
        weight[row] = weight[ids].mean(dim=0)
    return row


def _to_half(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().half().contiguous() for name, value in layers.items()}


def _to_kohya(
    layers: dict[str, torch.Tensor], prefix: str, alpha: float
) -> dict[str, torch.Tensor]:
    """Renames PEFT's layers: ``a.b.lora_A.weight`` to ``<prefix>a_b.lora_down.weight``."""
    renamed = {}
    for name, value in _to_half(layers).items():
        module, side, _ = name.rsplit(".", 2)
        flat = prefix + module.replace(".", "_")
        renamed[f"{flat}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        renamed[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return renamed
