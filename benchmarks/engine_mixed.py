"""The engine against one request at a time: mixed requests, arrivals over time, equal requests.

Sides, each with the same requests, in turns within one run:

- ``upstream``: load the LoRA's file, call, unload; what ``bentoml.diffusers`` would do.
- ``plain``: plain diffusers, all LoRAs resident, ``set_adapters`` before each call.
- ``batch``: one call of plain diffusers with all requests, which must be equal.
- ``separate``: this engine, but only requests with the same LoRA share a forward.
- ``engine``: this package.

Arrivals over time come at a fraction of what ``plain`` can serve per second, which is measured
first, so that the load is the same on any machine: 0.7 leaves it idle now and then, 1.2 is more
than it can do. A ratio is that side's time divided by the engine's, beside it the largest
difference of the images in levels of 8 bits. CPU seconds are the process's own, so they mean
something on a machine that others use too; wall-clock is for an idle one::

    OMP_NUM_THREADS=1 python benchmarks/engine_mixed.py --out benchmarks/results/engine.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bentoml
import diffusers
import numpy as np
import torch
from measuring import make_pipeline, save_lora

from bentoml_diffusers import Engine, EngineLimits, ModelOptions
from bentoml_diffusers.engine.forwards import calls
from bentoml_diffusers.workflow.record import processor_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LORAS = ("one", "two", "three")
LOADS = (0.7, 1.2)
SIZES = {"small": (32, 64, 64, 96), "large": (128, 256, 512, 512)}


@dataclass(frozen=True)
class Wish:
    """One request of the mix."""

    prompt: str
    steps: int
    guidance: float
    seed: int
    side: int
    lora: str | None

    def arguments(self) -> dict[str, Any]:
        """Arguments that both diffusers and the engine take."""
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.side,
            "width": self.side,
        }


@dataclass(frozen=True)
class Outcome:
    """What a side took, and its images."""

    wall_s: float
    cpu_s: float
    images: list[np.ndarray]
    latencies_s: list[float]


def draw_wishes(count: int, side: int, steps: tuple[int, int], seed: int = 0) -> list[Wish]:
    """Returns requests that differ in prompt, steps, guidance, seed and LoRA."""
    rng = random.Random(seed)
    return [
        Wish(
            prompt=rng.choice(("a red circle", "a blue star on the left", "a green square")),
            steps=rng.randint(*steps),
            guidance=rng.choice((1.0, 4.0, 7.5)),
            seed=number,
            side=side,
            lora=rng.choice((*LORAS, None)),
        )
        for number in range(count)
    ]


def measure(serve: Callable[[], list[tuple[Any, float]]]) -> Outcome:
    """Runs one side; it returns each image with the moment at which it was there."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = serve()
    return Outcome(
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        images=[np.asarray(image).astype(int) for image, _ in done],
        latencies_s=[latency for _, latency in done],
    )


class Sides:
    """All sides over equal weights."""

    def __init__(self, widths: tuple[int, ...], folder: Path) -> None:
        self.folder = folder
        self.upstream = make_pipeline(widths)
        self.plain = make_pipeline(widths)
        for number, name in enumerate(LORAS):
            save_lora(self.upstream, folder / f"{name}.safetensors", seed=number)
        for name in LORAS:
            self.plain.load_lora_weights(
                folder, weight_name=f"{name}.safetensors", adapter_name=name
            )
        self.engine = Engine(
            make_pipeline(widths), ModelOptions(lora_dir=str(folder)), EngineLimits()
        )
        self.parameters = sum(one.numel() for one in self.engine.pipeline.unet.parameters())

    def run_upstream(self, wish: Wish) -> Any:
        """Loads the file, calls, unloads."""
        if wish.lora:
            self.upstream.load_lora_weights(self.folder, weight_name=f"{wish.lora}.safetensors")
        image = _call(self.upstream, wish)
        if wish.lora:
            self.upstream.unload_lora_weights()
        return image

    def run_plain(self, wish: Wish) -> Any:
        """Switches to the resident LoRA, calls."""
        if wish.lora:
            self.plain.enable_lora()
            self.plain.set_adapters([wish.lora])
        else:
            self.plain.disable_lora()
        return _call(self.plain, wish)

    def one_at_a_time(
        self, run: Callable[[Wish], Any], wishes: Sequence[Wish], arrivals: Sequence[float]
    ) -> list[tuple[Any, float]]:
        """First come, first served."""
        start = time.perf_counter()
        done = []
        for wish, arrival in zip(wishes, arrivals, strict=True):
            _sleep_until(start + arrival)
            image = run(wish)
            done.append((image, time.perf_counter() - start - arrival))
        return done

    def by_engine(
        self, wishes: Sequence[Wish], arrivals: Sequence[float]
    ) -> list[tuple[Any, float]]:
        """All as they come."""
        start = time.perf_counter()
        finished: dict[int, float] = {}
        handles = []
        for number, (wish, arrival) in enumerate(zip(wishes, arrivals, strict=True)):
            _sleep_until(start + arrival)
            lora = f"{wish.lora}.safetensors" if wish.lora else None
            handle = self.engine.submit(
                "txt2img", seed=wish.seed, lora_weights=lora, **wish.arguments()
            )
            handle.future.add_done_callback(
                lambda _, number=number: finished.__setitem__(number, time.perf_counter())
            )
            handles.append(handle)
        images = [handle.result().images[0] for handle in handles]
        return [
            (image, finished[number] - start - arrivals[number])
            for number, image in enumerate(images)
        ]

    def by_separate_batches(
        self, wishes: Sequence[Wish], arrivals: Sequence[float]
    ) -> list[tuple[Any, float]]:
        """As servers do that switch LoRAs between batches."""
        key = calls.Job.key.fget
        with_lora = property(lambda job: (key(job), _lora_names(job)))
        with mock.patch.object(calls.Job, "key", with_lora):
            return self.by_engine(wishes, arrivals)

    def in_one_call(self, wishes: Sequence[Wish]) -> list[tuple[Any, float]]:
        """One call of plain diffusers, for requests that differ in their seeds only."""
        self.plain.disable_lora()
        start = time.perf_counter()
        arguments = {**wishes[0].arguments(), "prompt": [wish.prompt for wish in wishes]}
        images = self.plain(
            **arguments,
            generator=[torch.Generator().manual_seed(wish.seed) for wish in wishes],
        ).images
        return [(image, time.perf_counter() - start) for image in images]


def compare(name: str, sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Runs all sides in turns; returns the median ratios to the engine."""
    outcomes: dict[str, list[Outcome]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, serve in sides.items():
            outcomes[side].append(measure(serve))
    figures: dict[str, Any] = {"what": name}
    ours = outcomes["engine"]
    figures["engine"] = {
        "wall_s": _median(one.wall_s for one in ours),
        "cpu_s": _median(one.cpu_s for one in ours),
        "mean_latency_s": _median(statistics.fmean(one.latencies_s) for one in ours),
    }
    for side, theirs in outcomes.items():
        if side == "engine":
            continue
        pairs = list(zip(theirs, ours, strict=True))
        figures[side] = {
            "wall_ratio": _median(one.wall_s / two.wall_s for one, two in pairs),
            "cpu_ratio": _median(one.cpu_s / two.cpu_s for one, two in pairs),
            "latency_ratio": _median(
                statistics.fmean(one.latencies_s) / statistics.fmean(two.latencies_s)
                for one, two in pairs
            ),
            "largest_difference": max(_difference(one, two) for one, two in pairs),
        }
    print(json.dumps(figures), flush=True)
    return figures


def _compare_mixed(name: str, sides: Sides, wishes: list[Wish], rounds: int) -> dict[str, Any]:
    now = [0.0] * len(wishes)
    sides.by_engine(wishes, now)  # the cost profile is measured here
    return compare(
        name,
        {
            "upstream": lambda: sides.one_at_a_time(sides.run_upstream, wishes, now),
            "plain": lambda: sides.one_at_a_time(sides.run_plain, wishes, now),
            "engine": lambda: sides.by_engine(wishes, now),
        },
        rounds,
    )


def _compare_arrivals(
    load: float, name: str, sides: Sides, wishes: list[Wish], rounds: int
) -> dict[str, Any]:
    """Poisson arrivals at ``load`` times what plain diffusers can serve."""
    now = [0.0] * len(wishes)
    alone = measure(lambda: sides.one_at_a_time(sides.run_plain, wishes, now))
    capacity = len(wishes) / alone.wall_s
    rng = random.Random(1)
    arrivals = list(np.cumsum([rng.expovariate(load * capacity) for _ in wishes]))
    print(f"plain serves {capacity:.2f} requests/s; they arrive at {load * capacity:.2f}/s")
    figures = compare(
        name,
        {
            "upstream": lambda: sides.one_at_a_time(sides.run_upstream, wishes, arrivals),
            "plain": lambda: sides.one_at_a_time(sides.run_plain, wishes, arrivals),
            "separate": lambda: sides.by_separate_batches(wishes, arrivals),
            "engine": lambda: sides.by_engine(wishes, arrivals),
        },
        rounds,
    )
    return {**figures, "plain_requests_per_s": round(capacity, 3), "load": load}


def _compare_equal(name: str, sides: Sides, wishes: list[Wish], rounds: int) -> dict[str, Any]:
    return compare(
        name,
        {
            "batch": lambda: sides.in_one_call(wishes),
            "engine": lambda: sides.by_engine(wishes, [0.0] * len(wishes)),
        },
        rounds,
    )


def _compare_lone(name: str, sides: Sides, wishes: list[Wish], rounds: int) -> dict[str, Any]:
    pipeline = make_pipeline(SIZES["small"])  # without any LoRA layer
    return compare(
        name,
        {
            "plain": lambda: sides.one_at_a_time(lambda wish: _call(pipeline, wish), wishes, [0]),
            "engine": lambda: sides.by_engine(wishes, [0]),
        },
        rounds,
    )


def _lora_names(job: Any) -> tuple[str, ...]:
    return tuple(lora.name for lora in job.member.lease.prepared.wanted.loras)


def _call(pipeline: Any, wish: Wish) -> Any:
    generator = torch.Generator().manual_seed(wish.seed)
    return pipeline(**wish.arguments(), generator=generator).images[0]


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)


def _difference(one: Outcome, two: Outcome) -> int:
    pairs = zip(one.images, two.images, strict=True)
    return int(max(abs(first - second).max() for first, second in pairs))


def _equal(count: int) -> list[Wish]:
    return [Wish("a red circle", 12, 4.0, seed, 64, None) for seed in range(count)]


@dataclass(frozen=True)
class Figure:
    """A comparison: on which UNet, how, of what, how often."""

    size: str
    compare: Callable[[str, Sides, list[Wish], int], dict[str, Any]]
    wishes: list[Wish]
    rounds: int


FIGURES = {
    "24 mixed at once, small": Figure("small", _compare_mixed, draw_wishes(24, 64, (8, 20)), 3),
    **{
        f"32 mixed over time at {load} of plain's capacity, small": Figure(
            "small", functools.partial(_compare_arrivals, load), draw_wishes(32, 64, (8, 20)), 2
        )
        for load in LOADS
    },
    "8 equal, small": Figure("small", _compare_equal, _equal(8), 3),
    "alone, small": Figure("small", _compare_lone, _equal(1), 12),
    "12 mixed at once, large": Figure("large", _compare_mixed, draw_wishes(12, 64, (4, 8)), 2),
    "8 mixed at once, large, 32x32 latents": Figure(
        "large", _compare_mixed, draw_wishes(8, 256, (2, 4)), 5
    ),
}


def compare_all(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the figures of these names."""
    figures = []
    for size, widths in SIZES.items():
        chosen = [name for name in names if FIGURES[name].size == size]
        if not chosen:
            continue
        sides = Sides(widths, folder)
        print(f"{size} UNet: {sides.parameters / 1e6:.1f} M parameters", flush=True)
        for name in chosen:
            figure = FIGURES[name]
            figures.append(figure.compare(name, sides, figure.wishes, figure.rounds))
        sides.engine.close()
    return figures


def main() -> None:
    """Reads the command line, prints the figures and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="figures with this in their name")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in FIGURES if arguments.only in name]
    with tempfile.TemporaryDirectory() as folder:
        figures = compare_all(Path(folder), names)
    if arguments.out:
        _write(arguments.out, figures)


def _write(path: Path, figures: list[dict[str, Any]]) -> None:
    """Replaces the figures that were taken; others in the file stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text())["figures"] if path.exists() else []
    merged = {one["what"]: one for one in (*held, *figures)}
    report = {
        "machine": f"{processor_name()}, 1 thread",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, bentoml)},
        "figures": list(merged.values()),
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
