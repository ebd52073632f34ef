"""What the exact bits of an image depend on, beside pipeline and arguments."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch

from bentoml_diffusers import _compat
from bentoml_diffusers.workflow.files import Environment

_PACKAGES = (
    *("bentoml-diffusers", "bentoml", "torch", "diffusers", "transformers", "peft", "accelerate"),
    *("safetensors", "numpy", "pillow"),
)
# Each selects other kernels of MKL, torch or oneDNN, which round differently.
_KERNEL_VARIABLES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def read_environment(device: str) -> Environment:
    """Returns versions, hardware and numeric settings of the process, for a type of device."""
    return Environment(
        versions=_read_versions(),
        hardware={"machine": platform.machine(), "device": device, **_read_processor(device)},
        numerics={
            "attention_backend": _compat.attention_backend(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cuda_matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **{name: os.environ[name] for name in _KERNEL_VARIABLES if name in os.environ},
        },
    )


def device_of(pipeline: Any) -> str:
    """Returns the type of the device that a pipeline computes on, such as ``"cuda"``."""
    return _compat.execution_device(pipeline).type


@functools.cache
def _read_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        version = _compat.find_version(name)
        if version is not None:
            found[name] = version
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def _read_processor(device: str) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {"cpu": processor_name()}


@functools.cache
def processor_name() -> str:
    """Returns name, family and model of the processor; libraries choose their kernels by them."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor()
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    parts = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    return ", ".join([facts.get("model name", platform.processor()), *parts])
