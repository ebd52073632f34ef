"""How long, and how much disk, an import from a folder takes: ours beside BentoML's own.

    python benchmarks/store_import.py --gigabytes 2 --rounds 3

Both run in processes of their own, in turn, on the same folder, after a small import that loads
all modules. As root, both run as an ordinary user: root may edit read-only files in place, so for
it files are copied instead of linked (`--as-root` measures that).
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from measuring import read_status, reset_peak, run_child

NOBODY = 65534
MODULES = {"ours": "bentoml_diffusers", "bentoml": "bentoml._internal.frameworks.diffusers"}


def make_folder(folder: Path, size: int, parts: int = 2) -> None:
    """Writes a folder that both take for a pipeline, with `size` bytes of weights in all."""
    import numpy as np
    from safetensors.numpy import save_file

    (folder / "scheduler").mkdir(parents=True)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.40.0"}
    names = ["unet", *(f"unet_{number}" for number in range(2, parts + 1))]
    index |= {name: ["diffusers", "UNet2DModel"] for name in names}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    noise = np.random.default_rng(0).integers(0, 256, size // parts, dtype=np.uint8)
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        noise[:8] = np.frombuffer(name.ljust(8).encode(), dtype=np.uint8)
        save_file({"w": noise}, folder / name / "diffusion_pytorch_model.safetensors")


def measure(kind: str, folder: Path, warm: Path, user: int | None) -> None:
    """In a process of its own: imports, and prints what it cost."""
    import importlib

    module = importlib.import_module(MODULES[kind])
    import diffusers

    diffusers.DiffusionPipeline  # noqa: B018 - loads it
    home = Path(os.environ["BENTOML_HOME"])
    arguments = {"link": "copy"} if kind == "ours" else {}
    module.import_model("warm", str(warm), **arguments)
    os.sync()
    reset_peak()
    if user is not None:
        for path in (home, *home.rglob("*")):
            os.chown(path, user, user)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    before = read_status("VmHWM")
    started = time.perf_counter()
    module.import_model("model", str(folder))
    seconds = time.perf_counter() - started
    peak = read_status("VmHWM") - before
    stored = next(path for path in (home / "models" / "model").iterdir() if path.is_dir())
    print(json.dumps({"seconds": seconds, "peak": peak, "stored": str(stored)}), flush=True)


def new_blocks(stored: Path, source: Path) -> int:
    """Bytes of disk blocks below `stored` that are not those of `source`."""
    known = {path.stat().st_ino for path in source.rglob("*") if path.is_file()}
    files = {path.stat().st_ino: path.stat() for path in stored.rglob("*") if path.is_file()}
    return sum(stat.st_blocks * 512 for inode, stat in files.items() if inode not in known)


def tree_of(folder: Path) -> str:
    """One hash over all files of a folder."""
    from bentoml_diffusers.store.entries import hash_files, hash_tree

    return hash_tree(hash_files(folder))


def run(kind: str, root: Path, as_root: bool) -> dict[str, float]:
    """Imports once in a fresh store; returns what it cost."""
    home = Path(tempfile.mkdtemp(dir=root))
    command = [__file__, "--child", kind, "--root", str(root)]
    if os.geteuid() == 0 and not as_root:
        home.chmod(0o777)
        command += ["--user", str(NOBODY)]
    started = time.perf_counter()
    result = run_child(command, home, TMPDIR=str(home))
    stored = Path(result["stored"])
    result["process_s"] = time.perf_counter() - started
    result["blocks"] = new_blocks(stored, root / "folder")
    result["tree"] = tree_of(stored / "diffusion_model")
    shutil.rmtree(home)
    return result


def main() -> None:
    """Prints one line for each import and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--as-root", action="store_true")
    parser.add_argument("--child", choices=sorted(MODULES), help=argparse.SUPPRESS)
    parser.add_argument("--user", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child, options.root / "folder", options.root / "warm", options.user)
        return
    root = Path(tempfile.mkdtemp(prefix="store-import-", dir=options.root))
    try:
        compare(root, options)
    finally:
        shutil.rmtree(root)


def compare(root: Path, options: argparse.Namespace) -> None:
    """Runs both in turn, in changing order."""
    size = int(options.gigabytes * 10**9)
    make_folder(root / "folder", size)
    make_folder(root / "warm", 10_000)
    if os.geteuid() == 0 and not options.as_root:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    expected = tree_of(root / "folder")
    results: dict[str, list[dict[str, float]]] = {"ours": [], "bentoml": []}
    for number in range(options.rounds):
        for kind in list(results)[:: 1 if number % 2 else -1]:
            result = run(kind, root, options.as_root)
            results[kind].append(result)
            print(
                f"{kind:8} {result['seconds']:8.3f} s  {result['blocks'] / 1e6:10.3f} MB on disk  "
                f"{result['peak'] / 1e6:8.1f} MB memory  same files: {result['tree'] == expected}",
                flush=True,
            )
    print(f"\nmedians for {size / 1e9:g} GB, {options.rounds} rounds:")
    for field, unit in (("seconds", "s"), ("blocks", "bytes"), ("peak", "bytes")):
        ours, theirs = (
            statistics.median(item[field] for item in results[kind]) for kind in results
        )
        print(f"{field:8} ours {ours:14.3f} {unit}, bentoml {theirs:14.3f} {unit}")


if __name__ == "__main__":
    main()
