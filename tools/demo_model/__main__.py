"""Trains and measures the bundled demo model: ``python -m tools.demo_model --help``."""

from __future__ import annotations

import argparse
import functools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from tools.demo_model import evaluate, gallery, shapes, train_adapters, train_base, vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("tools.demo_model")

VAE_STEPS = 1200
VAE_PLANNED_STEPS = 2200
DECODER_STEPS = 1500

# The denoiser, as it was trained: each stage goes on from the one before it.
BASE_STAGES: dict[str, dict[str, Any]] = {
    "base_first": {"steps": 1000, "planned_steps": 5500, "rate": 1e-3, "decay": 0.999},
    "base_second": {
        "steps": 500,
        "planned_steps": 1900,
        "rate": 1e-3,
        "decay": 0.995,
        "seed": 12,
    },
    "base_third": {
        "steps": 400,
        "planned_steps": 1100,
        "rate": 1e-3,
        "decay": 0.99,
        "fresh_words": shapes.place_words(),
        "pool_size": 5000,
        "seed": 13,
    },
    "base_fourth": {
        "steps": 750,
        "planned_steps": 750,
        "rate": 1.5e-3,
        "decay": 0.99,
        "pool_size": 3000,
        "floor": 1.0,
        "high_noise": 0.7,
        "seed": 15,
    },
    "base_fifth": {
        "steps": 550,
        "planned_steps": 550,
        "rate": 1e-3,
        "decay": 0.98,
        "pool_size": 4000,
        "seed": 16,
    },
    # Shapes: their words had become alike, and they are a small part of the image.
    "base": {
        "steps": 8500,
        "planned_steps": 8500,
        "rate": 1e-3,
        "decay": 0.998,
        "fresh_words": shapes.SHAPES,
        "fresh_length": 1.2,
        "pool_size": 20_000,
        "shape_weight": 3.0,
        "seed": 21,
    },
}


def train(out: Path, stages: list[str]) -> None:
    """Runs the stages whose output is not there yet, in order."""
    for name, (target, make) in STAGES.items():
        if name not in stages:
            continue
        if (out / target).exists():
            logger.info("stage %s: %s is there, skipped", name, target)
            continue
        started = time.monotonic()
        unfinished = out / f"{name}.unfinished" / Path(target).name
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        make(out, unfinished)
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(out / target)
        unfinished.parent.rmdir()
        logger.info("stage %s: done in %.0f s", name, time.monotonic() - started)


def _make_whole_vae(out: Path, target: Path) -> None:  # noqa: ARG001 - every stage has this shape
    train_base.train_vae(target, steps=VAE_STEPS, planned_steps=VAE_PLANNED_STEPS)


def _make_vae(out: Path, target: Path) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae_whole")
    train_base.train_decoder(vae, target, steps=DECODER_STEPS)


def _make_base(name: str, out: Path, target: Path) -> None:
    names = list(BASE_STAGES)
    before = names[names.index(name) - 1] if name != names[0] else None
    train_base.train_denoiser(
        AutoencoderKL.from_pretrained(out / "vae_whole"),
        target,
        start=out / before if before else None,
        **BASE_STAGES[name],
    )


def _make_pipeline(out: Path, target: Path) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae")
    pipeline = StableDiffusionPipeline.from_pretrained(out / "base", vae=vae)
    vocabulary.hide_colours(pipeline)
    train_base.save_clean(pipeline, target)


def _make_outline(out: Path, target: Path) -> None:
    train_adapters.train_outline(out / "pipeline", target)


def _make_stripes(out: Path, target: Path) -> None:
    train_adapters.train_stripes(out / "pipeline", target)


def _make_teal(out: Path, target: Path) -> None:
    train_adapters.train_teal(out / "pipeline", target)


STAGES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "vae_whole": ("vae_whole", _make_whole_vae),
    "vae": ("vae", _make_vae),
    **{name: (name, functools.partial(_make_base, name)) for name in BASE_STAGES},
    "pipeline": ("pipeline", _make_pipeline),
    "outline": ("loras/outline.safetensors", _make_outline),
    "stripes": ("loras/stripes.safetensors", _make_stripes),
    "teal": ("embeddings/teal.safetensors", _make_teal),
}


def main() -> None:
    """Reads the command line and runs one command."""
    arguments = _build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.command == "train":
        train(arguments.out, arguments.stages)
    elif arguments.command == "evaluate":
        print(evaluate.format_table(evaluate.evaluate(arguments.folder)))
    else:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        pipeline = evaluate.load_pipeline(arguments.folder / "pipeline")
        gallery.generate_gallery(pipeline).save(arguments.out)
        adapters = gallery.generate_adapters(arguments.folder)
        adapters.save(arguments.out.with_name("adapters.png"))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train what is not there yet")
    training.add_argument("--out", type=Path, required=True, help="folder for all results")
    training.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    measuring = commands.add_parser("evaluate", help="print all figures as a Markdown table")
    measuring.add_argument("folder", type=Path, help="folder with pipeline, loras, embeddings")
    generation = commands.add_parser(
        "gallery", help="generate gallery.png and, beside, adapters.png"
    )
    generation.add_argument("folder", type=Path, help="folder with pipeline, loras, embeddings")
    generation.add_argument("--out", type=Path, default=Path("docs/images/gallery.png"))
    return parser


if __name__ == "__main__":
    main()
