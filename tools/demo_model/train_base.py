"""Trains the autoencoder, then text encoder and denoiser together."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tools.demo_model import networks, shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

# Drawn in training so that the autoencoder can generate what the LoRAs ask for.
_STYLES: tuple[shapes.Style, ...] = ("solid", "solid", "solid", "outline", "stripes")


def draw_images(
    scenes: list[shapes.Scene], rng: random.Random, style: shapes.Style | None = None
) -> torch.Tensor:
    """Returns uint8 images of shape (len(scenes), 3, 64, 64); ``None`` mixes the styles."""
    images = [
        np.asarray(shapes.draw_scene(scene, rng, style or rng.choice(_STYLES))) for scene in scenes
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def training_scenes() -> list[shapes.Scene]:
    """Returns all scenes but those held out, with those of the hidden colour."""
    held_out = set(shapes.held_out_scenes())
    said = [scene for scene in shapes.list_scenes() if scene not in held_out]
    hidden = {
        shapes.with_colour(scene, colour)
        for scene in shapes.list_scenes()
        for colour in shapes.HIDDEN_COLOURS
    }
    return said + sorted(hidden, key=lambda scene: scene.prompt)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 3 % of the steps, then a cosine to 2 % of the rate."""
    warm_up = max(1, steps * 3 // 100)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        turn = (step - warm_up) / max(1, steps - warm_up)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * turn))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Average:
    """An exponential moving average of the weights of some modules."""

    def __init__(self, *modules: torch.nn.Module, decay: float) -> None:
        """Starts from the weights that ``modules`` have now."""
        self._decay = decay
        self._live = modules
        self.modules = [copy.deepcopy(module).requires_grad_(False) for module in modules]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the live weights, faster in the first steps."""
        decay = min(self._decay, (step + 1) / (step + 10))
        for average, live in zip(self.modules, self._live, strict=True):
            for mean, value in zip(average.parameters(), live.parameters(), strict=True):
                mean.lerp_(value.detach(), 1 - decay)


def train_vae(
    folder: Path, *, steps: int, planned_steps: int, batch_size: int = 16, seed: int = 1
) -> None:
    """Trains the whole autoencoder and saves it, with its scaling factor, to ``folder``.

    Args:
        folder: Where to save.
        steps: Number of batches.
        planned_steps: Length of the learning rate's schedule; what is left of it after ``steps``
            goes to the decoder alone, see :func:`train_decoder`.
        batch_size: Images in a batch.
        seed: Seed of weights, images and batches.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = networks.build_vae()
    average = Average(vae, decay=0.995)
    pool = draw_images(rng.choices(training_scenes(), k=6000), rng)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    rates = schedule(optimizer, planned_steps)
    for step in range(steps):
        images = to_float(pool[torch.randint(len(pool), (batch_size,))])
        posterior = vae.encode(images).latent_dist
        loss = image_loss(vae.decode(posterior.sample()).sample, images, shape_weight=3.0)
        loss = loss + 2e-4 * posterior.kl().mean() / 256
        descend(loss, list(vae.parameters()), optimizer, rates)
        average.update(step)
        if step % 50 == 0:
            logger.info("vae %d: loss %.4f", step, loss.item())
    save_vae(average.modules[0], pool, folder)


def train_decoder(
    vae: AutoencoderKL, folder: Path, *, steps: int, batch_size: int = 16, seed: int = 3
) -> None:
    """Trains the decoder alone and saves the autoencoder; its latents stay what they were."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    average = Average(vae, decay=0.995)
    pool = draw_images(rng.choices(training_scenes(), k=6000), rng)
    parameters = [one for one in vae.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-4)
    rates = schedule(optimizer, steps)
    for step in range(steps):
        images = to_float(pool[torch.randint(len(pool), (batch_size,))])
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            latents = latents + 0.03 * torch.randn_like(latents) / vae.config.scaling_factor
        loss = image_loss(vae.decode(latents).sample, images, shape_weight=3.0)
        descend(loss, parameters, optimizer, rates)
        average.update(step)
        if step % 50 == 0:
            logger.info("decoder %d: loss %.4f", step, loss.item())
        if step % 250 == 249 or step == steps - 1:
            average.modules[0].save_pretrained(folder)


def image_loss(decoded: torch.Tensor, images: torch.Tensor, *, shape_weight: float) -> torch.Tensor:
    """Absolute and squared error; pixels of the shape count ``shape_weight`` times."""
    error = decoded - images
    weight = 1 + (shape_weight - 1) * shape_mask(images)
    return (weight * (error.abs() + error.square())).mean()


def descend(
    loss: torch.Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """One step of the optimizer, with gradients clipped at norm 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rates.step()


def shape_mask(images: torch.Tensor) -> torch.Tensor:
    """Returns 1 where a pixel differs from the upper left corner, else 0; one channel."""
    distance = (images - images[:, :, :1, :1]).abs().amax(dim=1, keepdim=True)
    return (distance > 0.1).float()


@torch.no_grad()
def save_vae(vae: AutoencoderKL, pool: torch.Tensor, folder: Path) -> None:
    """Saves the autoencoder with the scaling factor that gives its latents deviation 1."""
    latents = vae.encode(to_float(pool[:1000])).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(folder)


@dataclass(frozen=True)
class Pool:
    """Images to train on.

    Attributes:
        scenes: What they show.
        latents: Shape (n, 4, 16, 16), deviation 1.
        masks: Shape (n, 1, 16, 16), 1 where the shape touches a latent pixel, else 0.
    """

    scenes: list[shapes.Scene]
    latents: torch.Tensor
    masks: torch.Tensor


@torch.no_grad()
def draw_pool(
    vae: AutoencoderKL,
    scenes: list[shapes.Scene],
    rng: random.Random,
    style: shapes.Style = "solid",
) -> Pool:
    """Draws and encodes the scenes."""
    latents, masks = [], []
    for start in range(0, len(scenes), 250):
        images = to_float(draw_images(scenes[start : start + 250], rng, style))
        latents.append(vae.encode(images).latent_dist.mode() * vae.config.scaling_factor)
        masks.append(torch.nn.functional.max_pool2d(shape_mask(images), 4))
    return Pool(scenes, torch.cat(latents), torch.cat(masks))


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to almost no signal: colours depend on it, at few training steps."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def v_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    context: torch.Tensor,
    weights: torch.Tensor,
    *,
    floor: float = 0.4,
    high_noise: float = 0.0,
) -> torch.Tensor:
    """The v-prediction loss with min-SNR weights, gamma 5 (Hang et al. 2023, section 3.4).

    Place and colours are decided at almost no signal. To learn them ``floor`` is added to the
    weights, and a share ``high_noise`` of the time steps is drawn from the noisier half.
    ``weights``, shape (n, 1, 16, 16), weigh the places of the image.
    """
    scheduler = build_scheduler()
    noise = torch.randn_like(latents)
    steps = torch.randint(0, 1000, (len(latents),))
    noisier = torch.rand(len(latents)) < high_noise
    steps = torch.where(noisier, 500 + steps // 2, steps)
    noisy = scheduler.add_noise(latents, noise, steps)
    target = scheduler.get_velocity(latents, noise, steps)
    signal = scheduler.alphas_cumprod[steps]
    snr = signal / (1 - signal)
    weight = snr.clamp(max=5) / (snr + 1) + floor
    error = (unet(noisy, steps, context).sample - target).pow(2) * (weights / weights.mean())
    error = error.mean(dim=(1, 2, 3))
    return (weight * error).mean()


def draw_batches(
    tokenizer: CLIPTokenizer,
    pool: Pool,
    rng: random.Random,
    *,
    batch_size: int,
    shape_weight: float,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields token ids (batch, 32), one in ten of an empty prompt, latents, weights, for ever."""
    while True:
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch_size)]
        texts = ["" if rng.random() < 0.1 else shapes.describe(pool.scenes[i], rng) for i in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        yield ids.input_ids, pool.latents[chosen], 1 + (shape_weight - 1) * pool.masks[chosen]


def train_denoiser(
    vae: AutoencoderKL,
    folder: Path,
    *,
    steps: int,
    planned_steps: int,
    rate: float,
    decay: float,
    start: Path | None = None,
    fresh_words: Sequence[str] = (),
    fresh_length: float | None = None,
    pool_size: int = 12_000,
    floor: float = 0.4,
    high_noise: float = 0.0,
    shape_weight: float = 1.0,
    batch_size: int = 32,
    seed: int = 2,
) -> None:
    """Trains text encoder and denoiser together; saves the whole pipeline to ``folder``.

    Args:
        vae: Autoencoder; only its encoder is used.
        folder: Where to save.
        steps: Number of batches.
        planned_steps: Length of the learning rate's schedule, which may end beyond ``steps``.
        rate: Highest learning rate.
        decay: Of the average of the weights, which is what is saved.
        start: Folder of a pipeline to go on from, with pooled text; ``None`` starts from noise.
        fresh_words: Words that get new embeddings, see :func:`networks.refresh_words`.
        fresh_length: Their length.
        pool_size: Number of images.
        floor: See :func:`v_loss`.
        high_noise: See :func:`v_loss`.
        shape_weight: Weight of the places that the shape touches; the background has 1.
        batch_size: Images in a batch.
        seed: Seed of weights, images and batches.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, text_encoder, unet = _load_or_build(start)
    networks.refresh_words(text_encoder, tokenizer, fresh_words, fresh_length)
    pool = draw_pool(vae, rng.choices(training_scenes(), k=pool_size), rng)
    average = Average(text_encoder, unet, decay=decay)
    parameters = [*text_encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    rates = schedule(optimizer, planned_steps)
    batches = draw_batches(tokenizer, pool, rng, batch_size=batch_size, shape_weight=shape_weight)
    for step in range(steps):
        ids, clean, weights = next(batches)
        context = text_encoder(ids).last_hidden_state
        loss = v_loss(unet, clean, context, weights, floor=floor, high_noise=high_noise)
        descend(loss, parameters, optimizer, rates)
        average.update(step)
        if step % 100 == 0:
            logger.info("denoiser %d: loss %.4f", step, loss.item())
        if step % 200 == 199 or step == steps - 1:
            save_pipeline(vae, tokenizer, average.modules[0], average.modules[1], folder)


def _load_or_build(start: Path | None) -> tuple[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel]:
    if start is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(start, safety_checker=None)
        unet = networks.add_pooled_text(pipeline.unet).to(memory_format=torch.channels_last)
        return pipeline.tokenizer, pipeline.text_encoder.train(), unet
    tokenizer = networks.build_tokenizer(shapes.words())
    text_encoder = networks.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    unet = networks.build_unet(pooled_text=False).to(memory_format=torch.channels_last)
    return tokenizer, text_encoder, unet


def save_pipeline(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    folder: Path,
) -> None:
    """Saves a StableDiffusionPipeline without safety checker to ``folder``."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_clean(pipeline, folder)


def save_clean(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline, without the paths of this machine that diffusers writes in configs."""
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
