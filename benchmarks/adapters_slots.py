"""LoRA slots against PEFT: switching, loading and forwards on a UNet of SD1.5 topology.

Each figure is taken in pairs within one run, alternating, and is the median of ratios or of times;
equality of the outputs is printed with it. Run it on an idle machine::

    OMP_NUM_THREADS=1 python benchmarks/adapters_slots.py --out benchmarks/results/adapters.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import (
    RANK,
    difference,
    make_pipeline,
    milliseconds,
    ratio_of,
    save_lora,
    summarize,
    time_in_turns,
    timed,
)

from bentoml_diffusers import ModelOptions, import_lora
from bentoml_diffusers.adapters import AdapterBank, Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def _widths(width: int) -> tuple[int, ...]:
    """The levels of SD1.5, narrower."""
    return width, 2 * width, 4 * width, 4 * width


def forward(pipeline: Any, batch: int, side: int = 16) -> Callable[[], torch.Tensor]:
    """Returns a forward of the denoiser with fixed inputs."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, side, side, generator=random)
    text = torch.randn(batch, 24, 16, generator=random)
    steps = torch.full((batch,), 500)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return pipeline.unet(latents, steps, encoder_hidden_states=text).sample  # type: ignore[no-any-return]

    return run


class Bench:
    """A pipeline with a bank, a second one with PEFT, and a folder of LoRAs."""

    def __init__(self, width: int, folder: Path, files: int, slots: int) -> None:
        self.folder = folder
        self.ours, self.peft = (make_pipeline(_widths(width)) for _ in range(2))
        self.peft.unet.load_state_dict(self.ours.unet.state_dict())
        self.names = [f"l{index}.safetensors" for index in range(files)]
        for index, name in enumerate(self.names):
            save_lora(self.ours, folder / name, index)
        self.slots = slots
        self.bank = self.new_bank(slots)

    def new_bank(self, slots: int) -> AdapterBank:
        """Returns a bank that keeps nothing in host memory, so that each load reads its file."""
        return AdapterBank(
            self.ours, ModelOptions(lora_dir=str(self.folder), lora_slots=slots, lora_cache_bytes=0)
        )

    def load(self, name: str) -> Lease:
        """From the name to the slot."""
        return self.bank.acquire(self.bank.prepare(self.bank.find(name)))

    def shared(
        self, run: Callable[[], Any], shares: Sequence[tuple[Lease | None, int | None]]
    ) -> Callable[[], Any]:
        """Wraps a forward: who owns which samples."""

        def work() -> Any:
            with self.bank.forwarding("unet", shares):
                return run()

        return work

    def measure_switching(self, residents: int) -> dict[str, Any]:
        """To a resident LoRA, from its name to a forward and back, against `set_adapters`."""
        adapters = self.peft_adapters(range(residents))
        peft = [timed(lambda one=one: self.peft.set_adapters([one]))[0] for one in adapters[:8]]
        return {
            "residents": residents,
            "slots": milliseconds(self._time_switches(self.names[:residents])),
            "slots_by_tag": milliseconds(self._time_switches(self._tags(residents))),
            "peft": milliseconds(peft),
        }

    def _time_switches(self, names: Sequence[str]) -> list[float]:
        for name in names:
            self.load(name).release()
        ring, rounds = itertools.cycle(names), 200

        def switch() -> None:
            for _ in range(rounds):
                lease = self.load(next(ring))
                with self.bank.forwarding("unet", [(lease, None)]):
                    pass
                lease.release()

        return [timed(switch)[0] / rounds for _ in range(9)]

    def _tags(self, count: int) -> list[str]:
        """The first LoRAs as entries of the store."""
        paths = [self.folder / name for name in self.names[:count]]
        return [import_lora(path.stem, path).tag.name for path in paths]

    def measure_loading(self, residents: int) -> dict[str, Any]:
        """From a file to ready, next to residents; PEFT's `load_lora_weights` in the same run."""
        for name in self.names[:residents]:
            self.load(name).release()
        fresh = self.names[max(residents, 4) :]  # the first four are those of `measure_forward`
        ours, peft = [], []
        for name in fresh:
            seconds, lease = timed(lambda name=name: self.load(name))
            lease.release()
            ours.append(seconds)
        for name in fresh[:3]:
            peft.append(timed(lambda name=name: self._load_by_peft(name, "fresh"))[0])
            self.peft.delete_adapters("fresh")
        beside = len(self.peft.get_list_adapters().get("unet", ()))
        return {
            "residents": residents,
            "slots": milliseconds(ours),
            "peft": {"residents": beside, **milliseconds(peft)},
        }

    def _load_by_peft(self, name: str, adapter: str) -> None:
        self.peft.load_lora_weights(str(self.folder / name), adapter_name=adapter)

    def peft_adapters(self, numbers: Iterable[int]) -> list[str]:
        """Names of LoRAs in the model with PEFT, brought in where they are not there yet."""
        there = set(self.peft.get_list_adapters().get("unet", ()))
        for number in numbers:
            if f"a{number}" not in there:
                self._load_by_peft(self.names[number], f"a{number}")
        return [f"a{number}" for number in numbers]

    def peft_forward(self, run: Callable[[], Any], names: Sequence[str | None]) -> Any:
        """Each sample of a batch by PEFT, alone; ``None`` is the base."""
        rows = []
        for index, name in enumerate(names):
            if name is None:
                self.peft.disable_lora()
            else:
                self.peft.enable_lora()
                self.peft.set_adapters([name])
            rows.append(run()[index])
        self.peft.enable_lora()
        return torch.stack(rows)

    def measure_forward(
        self, batch: int, owners: Sequence[int | None], pairs: int
    ) -> dict[str, Any]:
        """A forward with LoRAs against the same without, and its equality with PEFT.

        Args:
            batch: Samples.
            owners: Number of the LoRA of each sample, ``None``: the base.
            pairs: Paired measurements.
        """
        ours, peft = forward(self.ours, batch), forward(self.peft, batch)
        plain = ours()
        leases = {one: self.load(self.names[one]) for one in owners if one is not None}
        shares: list[tuple[Lease | None, int | None]] = [
            (leases[one] if one is not None else None, 1) for one in owners
        ]
        mixed = self.shared(ours, shares)
        self.peft_adapters(leases)
        result = ratio_of(ours, mixed, pairs)
        theirs = self.peft_forward(peft, [None if one is None else f"a{one}" for one in owners])
        result |= {
            "largest_difference_to_peft": difference(mixed(), theirs),
            "largest_effect": difference(mixed(), plain),
            "base_after_is_equal": torch.equal(ours(), plain),
        }
        for lease in leases.values():
            lease.release()
        return result

    def measure_peft_forward(self, batch: int, pairs: int) -> dict[str, Any]:
        """PEFT's own price of one active LoRA, against the plain model."""
        self.peft.enable_lora()
        self.peft.set_adapters(["a0"])
        return ratio_of(forward(self.ours, batch), forward(self.peft, batch), pairs)

    def measure_request(self, steps: int, pairs: int) -> dict[str, Any]:
        """A whole request with a LoRA cold from disk against one without, in turn at each step."""
        self.bank.close()  # what other measurements brought into slots
        self.bank = self.new_bank(self.slots)
        cold = itertools.cycle(self.names)

        def generate(rest: Callable[[], None]) -> None:
            parts = {**self.ours.components, "scheduler": copy.deepcopy(self.ours.scheduler)}
            pipeline = type(self.ours)(**parts)
            pipeline.set_progress_bar_config(disable=True)
            pipeline(
                "a red circle",
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
                height=128,
                width=128,
                callback_on_step_end=lambda *given: rest() or given[-1],
            )

        def generate_with_lora(rest: Callable[[], None]) -> None:
            lease = self.load(next(cold))
            applied = contextlib.ExitStack()
            applied.enter_context(lease.applied())

            def rest_without() -> None:
                applied.close()
                rest()
                applied.enter_context(lease.applied())

            generate(rest_without)
            applied.close()
            lease.release()

        works = [generate, generate_with_lora]
        times = [time_in_turns(works) for _ in range(pairs // 2 + 1)]
        turned = [time_in_turns(works[::-1])[::-1] for _ in range(pairs // 2)]
        loads = {"requests": len(times) + len(turned), "files_read": self.bank.report().misses}
        return {"steps": steps, **loads, **summarize([*times[1:], *turned])}


def measure_memory(width: int, folder: Path, files: int, requests: int) -> dict[str, Any]:
    """Resident memory while requests name one of many files."""
    pipeline = make_pipeline(_widths(width))
    template = folder / "template.safetensors"
    save_lora(pipeline, template, 0)
    names = [f"n{index}.safetensors" for index in range(files)]
    for name in names:
        # The same content under many names: a key is the place of a file, not its content.
        (folder / name).hardlink_to(template)
    size = template.stat().st_size
    bank = AdapterBank(
        pipeline, ModelOptions(lora_dir=str(folder), lora_slots=8, lora_cache_bytes=40 * size)
    )
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(files, (requests,), generator=random).tolist()
    samples = []
    started = time.process_time()
    for index, number in enumerate(chosen):
        bank.acquire(bank.prepare(bank.find(names[number]))).release()
        if index % (requests // 20) == 0:
            gc.collect()
            samples.append(resident_mib())
    warm = samples[len(samples) // 4 :]
    report = bank.report()
    return {
        "names": files,
        "requests": requests,
        "file_mib": round(size / 2**20, 2),
        "resident_mib_after_warm_up": [round(warm[0], 1), round(warm[-1], 1)],
        "growth": round(max(warm) / warm[0] - 1, 4),
        "hits": report.hits,
        "misses": report.misses,
        "processor_s": round(time.process_time() - started, 1),
    }


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def about_this_run(pipeline: Any) -> dict[str, Any]:
    """Hardware and versions."""
    import diffusers
    import peft

    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "unet_parameters": sum(one.numel() for one in pipeline.unet.parameters()),
        "lora": {"rank": RANK, "layers": 128},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "clock": "processor time of this process; ratios are medians of alternating pairs",
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Takes all figures of the chosen parts."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["BENTOML_HOME"] = str(folder / "home")
        if "memory" not in options.only or len(options.only) > 1:
            bench = Bench(options.width, folder, options.residents + 12, options.residents + 4)
            figures["about"] = about_this_run(bench.ours)
        if "forward" in options.only:
            figures["batch_2_one_lora"] = bench.measure_forward(2, [0, 0], options.pairs)
            figures["batch_2_one_lora_peft"] = bench.measure_peft_forward(2, options.pairs)
            owners = [0, 0, 1, 1, 2, 3, None, None]
            figures["batch_8_four_loras_and_base"] = bench.measure_forward(8, owners, options.pairs)
        if "load" in options.only:
            figures["load_next_to_1"] = bench.measure_loading(1)
            figures["load_next_to_many"] = bench.measure_loading(options.residents)
        if "switch" in options.only:
            figures["switch_of_4"] = bench.measure_switching(4)
            if options.peft_residents:
                figures["switch_of_many"] = bench.measure_switching(options.peft_residents)
        if "request" in options.only:
            figures["request_cold"] = bench.measure_request(20, max(options.pairs // 4, 3))
        if "memory" in options.only:
            figures["memory"] = measure_memory(
                options.memory_width, folder, options.names, options.requests
            )
    return figures


def main() -> None:
    """Prints the figures and writes them to a file."""
    parts = ("forward", "load", "switch", "request", "memory")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--width", type=int, default=128, help="128 gives 135 M parameters")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--residents", type=int, default=64)
    parser.add_argument("--peft-residents", type=int, default=8)
    parser.add_argument("--memory-width", type=int, default=32)
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures = run(options)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        held = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**held, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
