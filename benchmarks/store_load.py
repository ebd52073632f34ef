"""From the store to a pipeline that is ready: seconds and memory, ours beside two others.

    python benchmarks/store_load.py --megabytes 540 --rounds 7

The others are diffusers' own `from_pretrained` on the same files, those in our store, and
BentoML's own module, with the files in the page cache. Until the first image of one step each has
processes of its own, in turn. Loading alone, which maps the weights, is alternated with
`from_pretrained` within one process.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import make_pipeline, read_status, reset_peak, run_child

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

KINDS = ("ours", "diffusers", "bentoml")


def make_folder(folder: Path, megabytes: int) -> int:
    """Saves a Stable Diffusion of about that size; returns the bytes of its weights."""
    width = 32 * max(1, round((megabytes / 540) ** 0.5 * 4))
    pipeline = make_pipeline((width, 2 * width, 4 * width, 4 * width))
    pipeline.save_pretrained(folder)
    return sum(item.numel() * item.element_size() for item in _weights(pipeline))


def _weights(pipeline: Any) -> list[torch.Tensor]:
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return [item for part in parts for item in part.state_dict().values()]


def measure(kind: str, folder: Path) -> None:
    """In a process of its own: prints the cost of a load up to the first image."""
    import torch

    load = _find_loader(kind, folder)
    load("warm")
    gc.collect()  # else it falls on some loads, and takes as long as they do
    reset_peak()
    before = read_status("VmHWM")
    started = time.perf_counter()
    pipeline = load("model")
    for value in _weights(pipeline):
        value.sum()  # weights are mapped, and read when they are used
    peak = read_status("VmHWM") - before
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a red circle", num_inference_steps=1, height=64, width=64, generator=generator
    ).images[0]
    first = time.perf_counter() - started
    digest = hashlib.sha256(image.tobytes())
    for value in _weights(pipeline):
        digest.update(value.numpy().tobytes())
    print(json.dumps({"first": first, "peak": peak, "digest": digest.hexdigest()}), flush=True)


def measure_pairs(folder: Path, pairs: int) -> None:
    """Alternates our load with that of diffusers; prints medians."""
    ours, diffusers = (_find_loader(kind, folder) for kind in KINDS[:2])
    ours("model"), diffusers("model")
    times = []
    for number in range(pairs):
        if number % 2:
            theirs, own = _time_of(diffusers), _time_of(ours)
        else:
            own, theirs = _time_of(ours), _time_of(diffusers)
        times.append((own, theirs))
    ratios = [own / theirs for own, theirs in times]
    result = {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "excess_ms": statistics.median(1000 * (own - theirs) for own, theirs in times),
        "best_ms": [1000 * min(side) for side in zip(*times, strict=True)],
    }
    print(json.dumps(result), flush=True)


def _find_loader(kind: str, folder: Path) -> Callable[[str], Any]:
    if kind == "ours":
        import bentoml_diffusers

        return bentoml_diffusers.load_model
    if kind == "bentoml":
        from bentoml._internal.frameworks import diffusers as theirs

        return theirs.load_model  # type: ignore[no-any-return]
    import diffusers

    return lambda name: diffusers.DiffusionPipeline.from_pretrained(str(folder / name))


def _time_of(load: Callable[[str], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    load("model")
    return time.perf_counter() - started


def link_stored(home: Path, folder: Path) -> Path:
    """Makes a folder with the pipelines of a store by their names."""
    folder.mkdir()
    for index in home.glob("models/*/*/*/model_index.json"):
        (folder / index.parents[2].name).symlink_to(index.parent)
    return folder


IMPORT = """
import os, sys
if sys.argv[1] == "ours":
    from bentoml_diffusers import import_model
else:
    from bentoml._internal.frameworks.diffusers import import_model
for name in ("warm", "model"):
    import_model(name, os.path.join(sys.argv[2], name))
print("{}")
"""


def main() -> None:
    """Prints one line for each process, and the medians of paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=540)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=(*KINDS, "pairs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "pairs":
        measure_pairs(options.root, options.pairs)
        return
    if options.child:
        measure(options.child, options.root)
        return
    root = Path(tempfile.mkdtemp(prefix="store-load-", dir=options.root))
    try:
        compare(root, options)
    finally:
        shutil.rmtree(root)


def compare(root: Path, options: argparse.Namespace) -> None:
    """Imports into both stores, then loads in turn."""
    weights = make_folder(root / "folder" / "model", options.megabytes)
    make_folder(root / "folder" / "warm", 1)
    for kind in ("ours", "bentoml"):
        run_child(["-c", IMPORT, kind, str(root / "folder")], root / kind)
    stored = link_stored(root / "ours", root / "stored")
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind in KINDS[:: 1 if number % 2 else -1]:
            result = run_child([__file__, "--child", kind, "--root", str(stored)], root / kind)
            if number:  # the first round fills the page cache
                results[kind].append(result)
                print(
                    f"{kind:10} first image {result['first']:7.3f} s, "
                    f"memory {result['peak'] / weights:.2f} x weights",
                    flush=True,
                )
    digests = {item["digest"] for items in results.values() for item in items}
    print(f"\n{weights / 1e6:.0f} MB of weights; the same weights and image: {len(digests) == 1}")
    for other in KINDS[1:]:
        pairs = zip(results["ours"], results[other], strict=True)
        ratio = statistics.median(ours["first"] / theirs["first"] for ours, theirs in pairs)
        print(f"until the first image, ours / {other}: {ratio:.2f} (median of pairs)")
    peaks = {kind: max(item["peak"] for item in items) / weights for kind, items in results.items()}
    loads = ["--child", "pairs", "--root", str(stored), "--pairs", str(options.pairs)]
    paired = run_child([__file__, *loads], root / "ours")
    best = " and ".join(f"{one:.0f}" for one in paired["best_ms"])
    quartiles = " to ".join(f"{one:.3f}" for one in paired["quartiles"])
    print(
        f"loading, ours / diffusers: {paired['ratio']:.3f}, {paired['excess_ms']:+.1f} ms "
        f"(medians of {options.pairs} pairs, quartiles {quartiles}; best times {best} ms)"
    )
    print("highest memory / weights: " + ", ".join(f"{k} {v:.2f}" for k, v in peaks.items()))


if __name__ == "__main__":
    main()
