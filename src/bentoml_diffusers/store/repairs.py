"""Repairs files that diffusers writes, or once wrote, and cannot read back.

Each repair works on the copy in the store and reports what it did. Its docstring names the
version of diffusers with the fault.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.store.entries import PIPELINE_INDEX
from bentoml_diffusers.store.sources import read_components

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


REPAIRED_FILES = (PIPELINE_INDEX, "unet/config.json")


def repair_pipeline(folder: Path) -> list[str]:
    """Repairs a pipeline in the store; returns what was done, as text."""
    done = []
    for repair in _REPAIRS:
        text = repair(folder)
        if text is not None:
            done.append(text)
    return done


def _name_library_of_deprecated_classes(folder: Path) -> str | None:
    """``["deprecated", "KarrasVeScheduler"]`` does not load (broken in diffusers 0.42.1).

    Nor do ``["diffusers", "ScoreSdeVpScheduler"]``, which diffusers exports one level lower,
    ``["wuerstchen", "PaellaVQModel"]`` of Stable Cascade, and other classes that moved with
    the deprecated pipelines.
    """
    if not (folder / PIPELINE_INDEX).is_file():
        return None  # a modular pipeline
    index = _read(folder / PIPELINE_INDEX)
    found = {
        name: (_names.find_moved_library(library, cls), cls)
        for name, (library, cls) in read_components(index, folder.name).items()
    }
    mended = {name: [library, cls] for name, (library, cls) in found.items() if library}
    if not mended:
        return None
    _write(folder / PIPELINE_INDEX, {**index, **mended})
    return f"index: library of {', '.join(sorted(mended))}"


def _keep_time_embedding_of_old_audio(folder: Path) -> str | None:
    """UNet1DModel's Fourier size of 8 became that of the first block (since diffusers 0.36)."""
    config_path = folder / "unet" / "config.json"
    weights = sorted((folder / "unet").glob("*.safetensors"))
    config = _read(config_path) if config_path.is_file() else {}
    is_audio = config.get("_class_name") == "UNet1DModel" and weights
    if not is_audio or config.get("time_embedding_dim") is not None:
        return None
    if config.get("time_embedding_type", "fourier") != "fourier":
        return None
    size = _first_length(weights[0], "time_proj.weight")
    blocks = config.get("block_out_channels") or (32,)
    if size is None or size == blocks[0]:
        return None
    _write(config_path, {**config, "time_embedding_dim": 2 * size})
    return f"unet: time_embedding_dim {2 * size}, as its weights have it"


def _number_adapters(folder: Path) -> str | None:
    """MultiAdapter writes its third adapter as ``adapter_1_2`` and reads ``adapter_2`` (0.42.1)."""
    if not (folder / PIPELINE_INDEX).is_file():
        return None
    done = []
    for name, (_, cls) in read_components(_read(folder / PIPELINE_INDEX), folder.name).items():
        number, written = 2, f"{name}_1_2"
        while cls == "MultiAdapter" and (folder / written).is_dir():
            (folder / written).rename(folder / f"{name}_{number}")
            done.append(f"{written} is {name}_{number}")
            number += 1
            written = f"{written}_{number}"
    return f"folders: {', '.join(done)}" if done else None


_REPAIRS: tuple[Callable[[Path], str | None], ...] = (
    _number_adapters,
    _name_library_of_deprecated_classes,
    _keep_time_embedding_of_old_audio,
)


def _first_length(path: Path, key: str) -> int | None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as tensors:
        if key not in set(tensors.keys()):
            return None
        return int(tensors.get_slice(key).get_shape()[0])


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _write(path: Path, value: dict[str, Any]) -> None:
    # Written as a new file: the old one may share its inode with the source.
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
