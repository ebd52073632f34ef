"""From the store to a pipeline that is ready: seconds and memory, ours beside two others.

    python benchmarks/store_load.py --megabytes 400 --rounds 9

The others are diffusers' own `from_pretrained` on the same files, those in our store, and
BentoML's own module. All run in processes of their own, in turn, with the files in the page cache.
Loading maps the weights; `first` adds reading them and a picture of one step.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from measuring import read_status, reset_peak, run_child

KINDS = ("ours", "diffusers", "bentoml")


def make_folder(folder: Path, megabytes: int) -> int:
    """Saves a pipeline of about that size; returns the bytes of its weights."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    width = 32 * max(1, round((megabytes / 60) ** 0.5 * 4))
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return sum(item.numel() * item.element_size() for item in unet.parameters())


def measure(kind: str, folder: Path) -> None:
    """In a process of its own: loads twice, first something small; prints what it cost."""
    import diffusers
    import torch

    if kind == "ours":
        import bentoml_diffusers

        load = bentoml_diffusers.load_model
    elif kind == "bentoml":
        from bentoml._internal.frameworks import diffusers as theirs

        load = theirs.load_model
    else:
        load = lambda name: diffusers.DiffusionPipeline.from_pretrained(str(folder / name))  # noqa: E731
    load("warm")
    reset_peak()
    before = read_status("VmHWM")
    started = time.perf_counter()
    pipeline = load("model")
    seconds = time.perf_counter() - started
    for value in pipeline.unet.parameters():
        value.sum()  # weights are mapped, and read when they are used
    peak = read_status("VmHWM") - before
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline(num_inference_steps=1, generator=generator).images[0]
    first = time.perf_counter() - started
    digest = hashlib.sha256(picture.tobytes())
    for _, value in sorted(pipeline.unet.state_dict().items()):
        digest.update(value.numpy().tobytes())
    result = {"seconds": seconds, "first": first, "peak": peak, "digest": digest.hexdigest()}
    print(json.dumps(result), flush=True)


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
    """Prints one line for each load, and the medians of paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
                    f"{kind:10} loaded {result['seconds']:7.3f} s, first picture "
                    f"{result['first']:7.3f} s, memory {result['peak'] / weights:.2f} x weights",
                    flush=True,
                )
    digests = {item["digest"] for items in results.values() for item in items}
    print(f"\n{weights / 1e6:.0f} MB of weights; the same weights and picture: {len(digests) == 1}")
    for other in KINDS[1:]:
        for field in ("seconds", "first"):
            pairs = [
                (a[field], b[field]) for a, b in zip(results["ours"], results[other], strict=True)
            ]
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            excess = statistics.median(1000 * (ours - theirs) for ours, theirs in pairs)
            print(f"{field}, ours / {other}: {ratio:.2f}, {excess:+.1f} ms (medians of pairs)")
    peaks = {kind: max(item["peak"] for item in items) / weights for kind, items in results.items()}
    print("highest memory / weights: " + ", ".join(f"{k} {v:.2f}" for k, v in peaks.items()))


if __name__ == "__main__":
    main()
