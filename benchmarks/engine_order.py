"""Whose work comes next: heavy and light callers, small ones that come late, deadlines.

Each side gets the same requests within one run, so that ratios mean something on a machine that
others use too:

- ``plain``: plain diffusers, one after the other as they came.
- ``one caller``: this engine, which is not told who asks.
- ``engine``: this engine, with ``caller=``.

``light``: one caller has 32 requests of many steps in the queue, another one asks for 4 steps,
again and again. Its time over that alone, without the one forward that it may have to wait for.
``late``: a small request comes while large ones run; the steps of these meanwhile. ``mixed``: small
and large ones, 10 to 1, arrive at 95 % of what the engine was measured to do; the share of those
that were taken and kept their deadline, and the error of the estimates at submission::

    OMP_NUM_THREADS=1 python benchmarks/engine_order.py --out benchmarks/results/order.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import make_pipeline

from bentoml_diffusers import Engine, EngineLimits, errors
from bentoml_diffusers.workflow.record import processor_name

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTHS = {"small": (32, 64, 64, 96), "large": (128, 256, 512, 512)}
CALL = {"prompt": "a red circle", "guidance_scale": 4.0}
LIGHT_STEPS = 4


@dataclass(frozen=True)
class Asked:
    """One request of a load."""

    arrival_s: float
    steps: int
    side: int = 64

    def arguments(self) -> dict[str, Any]:
        """For the pipeline."""
        return {
            **CALL,
            "num_inference_steps": self.steps,
            "height": self.side,
            "width": self.side,
        }


def time_of(work: Callable[[], Any]) -> float:
    """Returns wall seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_light(size: str, heavy_steps: int, side: int, rounds: int) -> dict[str, Any]:
    """A light caller beside a heavy one."""
    light = Asked(0, LIGHT_STEPS, side).arguments()
    figures: dict[str, Any] = {}
    for name, heavy, mine in (("one caller", "", ""), ("engine", "heavy", "light")):
        with Engine(make_pipeline(WIDTHS[size]), limits=EngineLimits()) as engine:

            def run(engine: Engine = engine, mine: str = mine) -> Any:
                return engine.run("txt2img", **light, caller=mine)

            run()
            alone = statistics.median(time_of(run) for _ in range(5))
            backlog = [
                engine.submit("txt2img", **Asked(0, heavy_steps, side).arguments(), caller=heavy)
                for _ in range(32)
            ]
            while backlog[0].progress[0] < 8:  # sizes of batches have been tried
                time.sleep(0.01)
            times = [time_of(run) for _ in range(rounds)]
            forward = _longest_forward(engine)
            for handle in backlog:
                handle.cancel()
        figures[name] = {
            "times_alone": round(statistics.median(times) / alone, 2),
            "times_alone_without_a_forward": round(max(times) / alone - forward / alone, 2),
        }
    return figures


def _longest_forward(engine: Engine) -> float:
    table = engine.report().seconds_per_row
    return max(
        (size * cost for kind, sizes in table.items() for size, cost in sizes.items() if kind),
        default=0.0,
    )


def measure_late(size: str, rounds: int) -> dict[str, Any]:
    """A small request comes while large ones run."""
    large, small = Asked(0, 60, 256).arguments(), Asked(0, 2, 64).arguments()
    waited = []
    with Engine(make_pipeline(WIDTHS[size]), limits=EngineLimits()) as engine:
        engine.run("txt2img", **small)
        running = [engine.submit("txt2img", **large) for _ in range(4)]
        while sum(handle.progress[0] for handle in running) < 4:
            time.sleep(0.01)
        for _ in range(rounds):
            before = sum(handle.progress[0] for handle in running)
            engine.run("txt2img", **small)
            waited.append(sum(handle.progress[0] for handle in running) - before)
        for handle in running:
            handle.cancel()
    return {"large_steps_meanwhile": waited}


def measure_mixed(size: str, count: int, load: float) -> dict[str, Any]:
    """Deadlines and estimates under Poisson arrivals, small to large 10 to 1."""
    rng = random.Random(1)
    steps = [30 if rng.random() < 1 / 11 else 3 for _ in range(count)]
    pipeline = make_pipeline(WIDTHS[size])
    plain_s = time_of(lambda: [_plain(pipeline, one) for one in steps])
    with Engine(pipeline, limits=EngineLimits(max_queue=count)) as engine:

        def serve(rate: float) -> tuple[float, list[tuple[float, float, float]], list[str]]:
            return _serve(engine, steps, rate, rng)

        serve(1e9)
        capacity = count / serve(1e9)[0]
        span, done, refused = serve(load * capacity)
    promised = [(late, end, guess) for late, end, guess in done]
    errors_of = sorted(abs(guess - end) / end for _, end, guess in promised if guess)
    return {
        "plain_over_engine_all_at_once": round(plain_s * capacity / count, 2),
        "requests_per_s": round(count / span, 2),
        "refused": len(refused),
        "kept": round(sum(late <= 0 for late, _, _ in promised) / max(1, len(promised)), 4),
        "error_median": round(statistics.median(errors_of), 3) if errors_of else None,
        "error_p95": round(errors_of[int(0.95 * len(errors_of))], 3) if errors_of else None,
    }


def _plain(pipeline: Any, steps: int) -> None:
    pipeline(**Asked(0, steps).arguments(), generator=torch.Generator().manual_seed(0))


def _serve(
    engine: Engine, steps: list[int], rate: float, rng: random.Random
) -> tuple[float, list[tuple[float, float, float]], list[str]]:
    """Returns the seconds for all, of each how late it was, its time and what was estimated."""
    started = time.perf_counter()
    alone = {3: 0.0, 30: 0.0}
    for one in alone:
        alone[one] = time_of(lambda one=one: engine.run("txt2img", **Asked(0, one).arguments()))
    ends: dict[int, float] = {}
    entries, refused, moment = [], [], time.perf_counter()
    started = moment
    for number, one in enumerate(steps):
        moment += rng.expovariate(rate)
        time.sleep(max(0.0, moment - time.perf_counter()))
        deadline = 20 * alone[one] if rate < 1e8 else None
        came = time.perf_counter()
        try:
            handle = engine.submit("txt2img", **Asked(0, one).arguments(), timeout_s=deadline)
        except (errors.DeadlineUnreachable, errors.DeadlineExceeded) as err:
            refused.append(type(err).__name__)
            continue
        guess = (deadline and handle.estimate.finish_s) or 0.0
        handle.future.add_done_callback(
            lambda _, number=number: ends.__setitem__(number, time.perf_counter())
        )
        entries.append((number, came, deadline or 1e9, guess, handle))
    done = []
    for number, came, deadline, guess, handle in entries:
        failed = handle.future.exception() is not None
        while number not in ends:
            time.sleep(0.001)
        end = ends[number] - came
        done.append((1.0 if failed else end - deadline, end, guess))
    return time.perf_counter() - started, done, refused


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "light, small UNet": lambda: measure_light("small", 150, 64, 10),
    "light, large UNet at 32x32 latents": lambda: measure_light("large", 20, 256, 3),
    "late, large UNet at 32x32 latents": lambda: measure_late("large", 4),
    "mixed, small UNet": lambda: measure_mixed("small", 120, 0.95),
}


def main() -> None:
    """Reads the command line, prints the figures and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="figures with this in their name")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name, take in FIGURES.items():
        if given.only in name:
            figures[name] = take()
            print(json.dumps({name: figures[name]}), flush=True)
    if given.out:
        report = {"machine": f"{processor_name()}, 1 thread", "figures": figures}
        given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
