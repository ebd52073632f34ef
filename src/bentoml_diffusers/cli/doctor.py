"""``bentoml diffusers doctor``: what a bug report needs to know about an installation."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers.cli.service_report import read_loaded
from bentoml_diffusers.cli.tables import Output, output_option, present, print_facts, print_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_PACKAGES = (
    *("bentoml-diffusers", "bentoml", "torch", "diffusers", "transformers", "peft", "accelerate"),
    *("safetensors", "huggingface_hub", "numpy", "pillow", "pydantic"),
)
_VARIABLES = (
    *("BENTOML_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE"),
)
_LOW_SPACE_BYTES = 5 * 10**9  # less than one typical model
_GPU_DRIVER = Path("/proc/driver/nvidia/version")


@click.command()
@click.option("--url", help="A running service, such as http://localhost:3000, to ask as well.")
@output_option
def doctor(url: str | None, output: Output) -> None:
    """Show versions, devices, settings and the model store, and what could go wrong.

    A section that cannot be read shows why; the others are shown anyway. The exit status is 0.
    """
    report = examine(url)
    if output == "json":
        print_json(report)
        return
    problems = report.pop("problems")
    for title, facts in report.items():
        click.echo(f"{title}:")
        print_facts((f"  {name}", value) for name, value in present(facts))
    click.echo(f"problems: {len(problems) or 'none'}")
    print_facts((" ", problem) for problem in problems)


def examine(url: str | None = None) -> dict[str, Any]:
    """Returns all sections by name, and under ``"problems"`` a list of texts."""
    readers: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": _read_versions,
        "devices": _read_devices,
        "settings": _read_settings,
        "store": _read_store,
    }
    if url is not None:
        readers["service"] = lambda: read_loaded(url)
    report: dict[str, Any] = {name: _attempt(read) for name, read in readers.items()}
    report["problems"] = list(_find_problems(report))
    return report


def _attempt(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read()
    except click.ClickException as error:
        return {"error": error.message}
    except Exception as error:  # noqa: BLE001 - the report is for broken installations
        return {"error": f"{type(error).__name__}: {error}"}


def _read_versions() -> dict[str, Any]:
    from bentoml_diffusers import _compat

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _compat.find_version(name) for name in _PACKAGES},
        "unmet": _compat.unmet_requirements(),
    }


def _read_devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"torch_build": f"CUDA {torch.version.cuda}"}
    if torch.version.cuda is None:
        devices["torch_build"] = f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices[f"cuda:{index}"] = {"name": name, "free_bytes": free, "memory_bytes": total}
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU"}
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE")}
    memory = pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"]
    name = platform.processor() or platform.machine()
    return {**devices, "cpu": {"name": name, "cores": os.cpu_count(), "memory_bytes": memory}}


def _read_settings() -> dict[str, Any]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _read_store() -> dict[str, Any]:
    from bentoml_diffusers import _compat
    from bentoml_diffusers.store import list_entries

    root = _compat.model_store().root
    there = next(path for path in (root, *root.parents) if path.exists())
    kinds: dict[str, int] = {}
    broken: dict[str, str] = {}
    for model in list_entries():
        kind, fault = _inspect(Path(model.path))
        kinds[kind] = kinds.get(kind, 0) + 1
        if fault:
            broken[str(model.tag)] = fault
    return {
        "path": str(root),
        "is_writable": os.access(there, os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(there).free,
        "entries": kinds,
        "broken": broken,
    }


def _inspect(entry: Path) -> tuple[str, str]:
    """Returns the kind of an entry and what is wrong with it; reads no weights."""
    from bentoml_diffusers.errors import DiffusersError
    from bentoml_diffusers.store import read_record
    from bentoml_diffusers.store.entries import PIPELINE_FOLDER

    try:
        record = read_record(entry)
    except (DiffusersError, OSError) as error:
        return "unreadable", str(error)
    folder = entry / (record.folder if record else PIPELINE_FOLDER)
    files = record.files if record else ()
    gone = [name for name in files if not (folder / name).is_file()]
    if gone or not folder.is_dir():
        return record.kind if record else "pipeline", f"lacks {', '.join(gone[:3]) or folder.name}"
    return record.kind if record else "pipeline", ""


def _find_problems(report: Mapping[str, Any]) -> Iterator[str]:
    for name, facts in report.items():
        if "error" in facts:
            yield f"{name}: {facts['error']}"
    yield from report["versions"].get("unmet", ())
    if report["devices"].get("torch_build") == "CPU" and _GPU_DRIVER.exists():
        yield "torch is a CPU build, but there is an NVIDIA driver: install a CUDA build"
    store = report["store"]
    if not store.get("is_writable", True):
        yield f"the model store {store['path']} cannot be written: set BENTOML_HOME"
    if store.get("free_bytes", _LOW_SPACE_BYTES) < _LOW_SPACE_BYTES:
        yield f"{store['free_bytes'] / 1e9:.1f} GB are free for the model store"
    for tag, fault in store.get("broken", {}).items():
        yield f"{tag}: {fault}; import it again, or delete it"
