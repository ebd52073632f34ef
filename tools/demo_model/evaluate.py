"""Measures the demo model by program: generates held-out scenes and judges the images."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from tools.demo_model import shapes, train_base
from tools.demo_model.judge import Judgement, judge_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

STEPS = 25
GUIDANCE_SCALE = 4.0
SCHEDULERS = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)

Figures = dict[str, float]


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Returns the pipeline in ``folder``, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_loras(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Loads both LoRAs of the demo in ``folder`` under their names."""
    for name in ("outline", "stripes"):
        pipeline.load_lora_weights(
            folder / "loras", weight_name=f"{name}.safetensors", adapter_name=name
        )


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch_size: int = 50,
) -> list[Image.Image]:
    """Generates one image for each prompt; the n-th has the seed ``seed + n``."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        seeds = range(seed + start, seed + start + len(batch))
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
        ).images
    return images


def measure(
    pipeline: StableDiffusionPipeline,
    scenes: Sequence[shapes.Scene],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
) -> Figures:
    """Returns the share of images, 0 to 1, that show each property of their scene."""
    prompts = [scene.prompt for scene in scenes]
    images = generate(pipeline, prompts, steps=steps, guidance_scale=guidance_scale, seed=seed)
    return compare(images, scenes)


def compare(images: Sequence[Image.Image], scenes: Sequence[shapes.Scene]) -> Figures:
    """Returns the share of images, 0 to 1, in which the judge finds what the scene says.

    ``all`` counts images that are right in every property.
    """
    marks = [
        judge_image(image).agrees_with(scene) for image, scene in zip(images, scenes, strict=True)
    ]
    figures = {name: fmean(mark[name] for mark in marks) for name in marks[0]}
    return {**figures, "all": fmean(all(mark.values()) for mark in marks)}


def measure_judge(vae: AutoencoderKL) -> dict[str, Figures]:
    """Returns the judge's own rates, on drawn images and after a pass through ``vae``."""
    scenes = shapes.held_out_scenes()
    drawn = train_base.draw_images(scenes, random.Random(6), "solid")
    with torch.no_grad():
        latents = vae.encode(train_base.to_float(drawn)).latent_dist.mode()
        decoded = vae.decode(latents).sample
    error = (decoded - train_base.to_float(drawn)).abs().mean().item() / 2
    repainted = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
    return {
        "drawn": compare(_to_images(drawn), scenes),
        "through the vae": compare(_to_images(repainted), scenes) | {"mean abs error": error},
    }


def measure_guidance(
    pipeline: StableDiffusionPipeline, scales: Iterable[float], count: int = 40
) -> dict[str, Figures]:
    """Returns the figures of the first ``count`` held-out scenes for several guidance scales."""
    scenes = shapes.held_out_scenes()[:count]
    return {f"guidance {g:g}": measure(pipeline, scenes, guidance_scale=g) for g in scales}


def measure_schedulers(
    pipeline: StableDiffusionPipeline, steps: int, count: int = 20
) -> dict[str, Figures]:
    """Returns the figures of the first ``count`` held-out scenes for each scheduler."""
    shipped = pipeline.scheduler
    scenes = shapes.held_out_scenes()[:count]
    figures = {}
    for scheduler in SCHEDULERS:
        pipeline.scheduler = scheduler.from_config(shipped.config)
        figures[f"{scheduler.__name__}, {steps} steps"] = measure(pipeline, scenes, steps=steps)
    pipeline.scheduler = shipped
    return figures


def measure_adapters(folder: Path, count: int = 40) -> dict[str, Figures]:
    """Returns what each adapter in ``folder`` does to the first ``count`` held-out scenes."""
    scenes = shapes.held_out_scenes()[:count]
    pipeline = load_pipeline(folder / "pipeline")
    load_loras(pipeline, folder)
    settings = {
        "outline 1.0": {"outline": 1.0},
        "outline 0.5": {"outline": 0.5},
        "stripes 1.0": {"stripes": 1.0},
        "stripes 0.5": {"stripes": 0.5},
        "both 1.0": {"outline": 1.0, "stripes": 1.0},
    }
    pipeline.disable_lora()
    figures = {"no adapter": _measure_style(pipeline, scenes)}
    pipeline.enable_lora()
    for title, weights in settings.items():
        pipeline.set_adapters(list(weights), list(weights.values()))
        figures[title] = _measure_style(pipeline, scenes)
    return figures


def measure_teal(folder: Path, count: int = 40) -> dict[str, Figures]:
    """Returns how often shapes are teal with the learnt word and with the plain one."""
    pipeline = load_pipeline(folder / "pipeline")
    pipeline.load_textual_inversion(folder / "embeddings" / "teal.safetensors", token="<teal>")  # noqa: S106 - a word, no password
    scenes = [shapes.with_colour(scene, "teal") for scene in shapes.held_out_scenes()[:count]]
    return {
        word: compare(
            generate(pipeline, [replace(scene, colour=word).prompt for scene in scenes]), scenes
        )
        for word in ("<teal>", "teal")
    }


def measure_img2img(folder: Path, count: int = 40, strength: float = 0.6) -> dict[str, Figures]:
    """Returns how often image-to-image gives a drawn shape the colour that the prompt says."""
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(load_pipeline(folder / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    drawn = shapes.held_out_scenes()[:count]
    wanted = [shapes.with_colour(scene, _next_colour(scene)) for scene in drawn]
    rng = random.Random(7)
    images = pipeline(
        [scene.prompt for scene in wanted],
        image=[shapes.draw_scene(scene, rng) for scene in drawn],
        strength=strength,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
    ).images
    return {f"image to image, strength {strength:g}": compare(images, wanted)}


def _next_colour(scene: shapes.Scene) -> str:
    names = [name for name in shapes.COLOURS if name != scene.background]
    return names[(names.index(scene.colour) + 1) % len(names)]


def _measure_style(pipeline: StableDiffusionPipeline, scenes: Sequence[shapes.Scene]) -> Figures:
    images = generate(pipeline, [scene.prompt for scene in scenes])
    judgements = [judge_image(image) for image in images]
    tests: dict[str, Callable[[Judgement], bool]] = {
        "hollow": lambda judgement: judgement.hollow,
        "striped": lambda judgement: judgement.style == "stripes",
    }
    shares = {name: fmean(map(test, judgements)) for name, test in tests.items()}
    return shares | compare(images, scenes)


def _to_images(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def evaluate(folder: Path) -> dict[str, Figures]:
    """Returns all figures of the model card for the demo model in ``folder``."""
    pipeline = load_pipeline(folder / "pipeline")
    shipped = type(pipeline.scheduler).__name__
    scenes = shapes.held_out_scenes()
    return {
        **{f"judge, {kind}": rates for kind, rates in measure_judge(pipeline.vae).items()},
        f"as shipped, {shipped}, {STEPS} steps": measure(pipeline, scenes),
        **measure_guidance(pipeline, (3.0, 5.0, 7.5)),
        **measure_schedulers(pipeline, steps=20),
        **measure_schedulers(pipeline, steps=10),
        **measure_adapters(folder),
        **measure_teal(folder),
        **measure_img2img(folder),
    }


def format_table(figures: dict[str, Figures]) -> str:
    """Returns the figures as a Markdown table, shares in per cent."""
    columns = list(dict.fromkeys(name for rates in figures.values() for name in rates))
    lines = [
        "| " + " | ".join(["measured", *columns]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for title, rates in figures.items():
        cells = [f"{100 * rates[name]:.1f}" if name in rates else "" for name in columns]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)
