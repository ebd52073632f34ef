"""What the benchmarks share: a LoRA, times in pairs, a child process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def make_pipeline(widths: tuple[int, ...]) -> Any:
    """Returns a Stable Diffusion with random weights and a UNet of four levels; all else is tiny.

    Args:
        widths: Channels of the levels. SD1.5 has (320, 640, 1280, 1280).
    """
    import torch
    from diffusers import UNet2DConditionModel

    from bentoml_diffusers import testing

    pipeline = testing.tiny_stable_diffusion()
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=2 if widths[0] > 32 else 1,
        cross_attention_dim=16,
        attention_head_dim=8,
    ).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_lora(pipeline: Any, path: Path, seed: int) -> None:
    """Writes a LoRA of rank 16 on all attention projections, in the layout of diffusers."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(TARGETS) and isinstance(module, torch.nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=random)
            up = torch.randn(module.out_features, RANK, generator=random)
            tensors[f"unet.{name}.lora_A.weight"] = down / module.in_features**0.5
            tensors[f"unet.{name}.lora_B.weight"] = up * 0.1
    save_file(tensors, path)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the processor seconds that this process spent, and the result.

    Processor time, since other processes on the machine lengthen the wall time of single threads.
    """
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def ratio_of(plain: Callable[[], Any], other: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Alternates both: median and quartiles of the paired ratios, and the ratio of best times."""
    plain(), other()
    times = []
    for index in range(pairs):
        if index % 2:
            second, first = timed(other)[0], timed(plain)[0]
        else:
            first, second = timed(plain)[0], timed(other)[0]
        times.append((first, second))
    return summarize(times)


def summarize(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median and quartiles of paired ratios, second to first, and the ratio of best times."""
    low, middle, high = statistics.quantiles((other / base for base, other in times), n=4)
    plain, others = zip(*times, strict=True)
    return {
        "ratio": round(middle, 4),
        "ratio_of_best": round(min(others) / min(plain), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "base_ms": round(1000 * statistics.median(plain), 2),
        "pairs": len(times),
    }


def time_in_turns(works: Sequence[Callable[[Callable[[], None]], Any]]) -> list[float]:
    """Runs works in threads, one at a time; returns the processor seconds of each.

    Args:
        works: Each gets a function that lets the next one go on, and calls it as often as the
            others do. So what is compared runs within moments of each other, however long it is.
    """
    turns = [threading.Semaphore(0) for _ in works]
    seconds = [0.0 for _ in works]
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            take_turns(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    def take_turns(number: int) -> None:
        turns[number].acquire()
        started = time.thread_time()
        following = turns[(number + 1) % len(works)]

        def hand_over() -> None:
            following.release()
            turns[number].acquire()

        works[number](hand_over)
        seconds[number] = time.thread_time() - started
        following.release()

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))
    ]
    for thread in threads:
        thread.start()
    turns[0].release()
    while not failures and any(thread.is_alive() for thread in threads):
        threads[-1].join(0.1)
        threads[0].join(0.1)
    if failures:
        raise failures[0]
    return seconds


def milliseconds(times: Sequence[float]) -> dict[str, Any]:
    """Median and best of some seconds, in milliseconds."""
    return {
        "median_ms": round(1000 * statistics.median(times), 3),
        "best_ms": round(1000 * min(times), 3),
        "times": len(times),
    }


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((one - other).abs().max())


def run_child(command: Sequence[str], home: Path, **environment: str) -> dict[str, Any]:
    """Runs Python in a process of its own over a model store; returns the JSON of its last line."""
    done = subprocess.run(  # noqa: S603 - a benchmark itself
        [sys.executable, *command],
        env={**os.environ, **_store(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _store(home: Path) -> dict[str, str]:
    return {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}


def reset_peak() -> None:
    """Makes the highest resident memory count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def read_status(field: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
