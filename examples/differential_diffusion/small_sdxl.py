"""A small Stable Diffusion XL that generates: the demo model in the shape of SDXL.

Nothing is trained but one small layer. SDXL differs from the demo model in how a prompt reaches
the denoiser, so its text encoder gets two more layers, its denoiser a projection in front:

- SDXL reads the last but one hidden state of its text encoders, the demo model the normalised
  last one. A layer of the second encoder does the normalisation, ``SCALE`` times as large as
  what the residual adds to it, and the projection divides by ``SCALE``.
- SDXL adds a *pooled* prompt and sizes to the time embedding, where the demo model pools by
  attention. Two linear layers are fitted to what it pools, over the sentences that it knows.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bentoml_diffusers.demo import PIPELINE

if TYPE_CHECKING:
    from collections.abc import Iterator

SCALE = 1e6
TIME_WIDTH = 8  # of each of the six numbers that SDXL says about sizes
FIT_STEPS = 3000

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("at the left", "in the centre", "at the right")


def build_components() -> dict[str, object]:
    """Returns the components of the small SDXL by their names there."""
    demo = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = extend_text_encoder(demo.text_encoder)
        unet = make_unet(demo, encoder)
    return {
        "text_encoder": demo.text_encoder,
        "text_encoder_2": encoder,
        "tokenizer": demo.tokenizer,
        "tokenizer_2": demo.tokenizer,
        "unet": unet,
        "vae": demo.vae,
        "scheduler": EulerDiscreteScheduler.from_config(
            demo.scheduler.config, timestep_spacing="leading"
        ),
    }


def extend_text_encoder(small: torch.nn.Module) -> CLIPTextModelWithProjection:
    """Returns the demo's text encoder with a layer that normalises and one that does nothing."""
    config = small.config.to_dict() | {
        "num_hidden_layers": small.config.num_hidden_layers + 2,
        "projection_dim": small.config.hidden_size,
    }
    large = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    old, new = _text_model(small), large.text_model
    state = {f"text_model.{name}": value for name, value in old.state_dict().items()}
    large.load_state_dict(state, strict=False)
    norm = old.final_layer_norm
    with torch.no_grad():
        for layer in new.encoder.layers[-2:]:
            for part in (layer.self_attn.out_proj, layer.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
        _pass_through(new.encoder.layers[-2].mlp)
        new.encoder.layers[-2].layer_norm2.load_state_dict(norm.state_dict())
        new.final_layer_norm.reset_parameters()
        large.text_projection.weight.copy_(torch.eye(norm.weight.numel()))
    return large


def _text_model(encoder: torch.nn.Module) -> torch.nn.Module:
    return getattr(encoder, "text_model", encoder)


def _pass_through(mlp: torch.nn.Module) -> None:
    """Makes an MLP return its input times SCALE: ``x sigmoid(cx) + x sigmoid(-cx) = x``."""
    width = mlp.fc2.out_features
    unit = torch.eye(width)
    mlp.fc1.weight.zero_()
    mlp.fc1.bias.zero_()
    mlp.fc1.weight[: 2 * width] = torch.cat([unit, -unit])
    mlp.fc2.weight[:, : 2 * width] = SCALE * torch.cat([unit, -unit], dim=1)


def make_unet(
    demo: StableDiffusionPipeline, encoder: CLIPTextModelWithProjection
) -> UNet2DConditionModel:
    """Returns the demo's denoiser with SDXL's ways in for a prompt."""
    width = encoder.config.hidden_size
    both = demo.text_encoder.config.hidden_size + width
    unet = UNet2DConditionModel.from_config(
        {
            **demo.unet.config,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_WIDTH,
            "projection_class_embeddings_input_dim": width + 6 * TIME_WIDTH,
            "encoder_hid_dim": both,
            "encoder_hid_dim_type": "text_proj",
        }
    ).eval()
    state = demo.unet.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("add_embedding")}
    unet.load_state_dict(kept, strict=False)
    with torch.no_grad():
        unet.encoder_hid_proj.bias.zero_()
        unet.encoder_hid_proj.weight.zero_()
        unet.encoder_hid_proj.weight[:, -width:] = torch.eye(width) / SCALE
    fit_pooling(unet, demo, encoder)
    return unet


def fit_pooling(
    unet: UNet2DConditionModel,
    demo: StableDiffusionPipeline,
    encoder: CLIPTextModelWithProjection,
) -> None:
    """Fits SDXL's layers for the pooled prompt to what the demo model pools."""
    pooled, wanted = collect_pooled(demo, encoder)
    layers = unet.add_embedding
    times = torch.zeros(len(pooled), layers.linear_1.in_features - pooled.shape[1])
    with torch.no_grad():
        layers.linear_1.weight[:, pooled.shape[1] :] = 0  # sizes have no say
    optimizer = torch.optim.Adam(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        chosen = torch.randint(len(pooled), (256,))
        generated = layers(torch.cat([pooled[chosen], times[chosen]], dim=1))
        loss = torch.nn.functional.mse_loss(generated, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def collect_pooled(
    demo: StableDiffusionPipeline, encoder: CLIPTextModelWithProjection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for each sentence, what SDXL pools and what the demo model pools; (n, width)."""
    pooled, wanted = [], []
    sentences = ["", *list_sentences()]
    for start in range(0, len(sentences), 128):
        tokens = demo.tokenizer(
            sentences[start : start + 128],
            padding="max_length",
            max_length=demo.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        pooled.append(encoder(tokens).text_embeds)
        wanted.append(demo.unet.add_embedding(demo.text_encoder(tokens)[0]))
    return torch.cat(pooled), torch.cat(wanted)


def list_sentences() -> Iterator[str]:
    """Yields the sentences that the demo model knows."""
    for size, colour, shape, ground, place in itertools.product(
        ("small", "big"), COLOURS, SHAPES, COLOURS, PLACES
    ):
        if colour != ground:
            yield f"a {size} {colour} {shape} on a {ground} background {place}"
