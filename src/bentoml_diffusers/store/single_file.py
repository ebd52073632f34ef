"""A single-file Stable Diffusion checkpoint -> a pipeline in the store, without the network.

Such a file holds only weights. Configs and tokenizers come from a folder, or from a stored model
of the same family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel, UntrustedSource
from bentoml_diffusers.store.entries import PIPELINE_FOLDER, get
from bentoml_diffusers.store.filling import fill_from_pipeline
from bentoml_diffusers.store.sources import (
    PICKLE_SUFFIXES,
    check_safetensors,
    class_name,
    read_classic_index,
)

if TYPE_CHECKING:
    import os

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.store.entries import Record

_DENOISER_KEYS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")
_ADAPTER_KEYS = ("lora_", ".lora", "lora.")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """A single-file checkpoint that was inspected.

    Attributes:
        path: The file.
        config: Folder with configs and tokenizers; ``None``: diffusers looks for them on the
            hub, or in its cache.
        dtype: Dtype that most of its tensors have.
    """

    path: Path
    config: Path | None
    dtype: str | None


def open_checkpoint(
    path: Path, config: str | os.PathLike[str] | None, *, allow_pickle: bool
) -> Checkpoint:
    """Inspects a single-file checkpoint before its weights are read.

    Raises:
        InvalidModel: 400, not a checkpoint of a complete pipeline, or a broken file.
        UntrustedSource: 400, a pickle without ``allow_pickle``.
        ModelNotFound: 404, ``config`` is neither a folder nor a stored model.
    """
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pickle:
            raise UntrustedSource(
                "single file",
                path.name,
                "safetensors, as a pickle can run code when it is read; "
                "allow_pickle=True reads tensors out of it",
            )
        return Checkpoint(path, _find_config(config), None)
    if path.suffix != ".safetensors":
        raise InvalidModel(path.name, "is not a .safetensors file", "give a folder or a checkpoint")
    check_safetensors(path, path.name, path.name)
    header = read_header(path)
    if not any(key.startswith(_DENOISER_KEYS) for key in header):
        is_adapter = any(part in key for key in header for part in _ADAPTER_KEYS)
        raise InvalidModel(
            path.name,
            "is not a checkpoint of a complete pipeline" + (", but a LoRA" if is_adapter else ""),
            "use import_lora" if is_adapter else "give the folder of the pipeline",
        )
    dtypes = [value["dtype"] for value in header.values()]
    return Checkpoint(path, _find_config(config), _DTYPES.get(max(dtypes, key=dtypes.count)))


def fill_from_checkpoint(
    entry: Path, record: Record, checkpoint: Checkpoint, pipeline_class: Any
) -> Record:
    """Converts a checkpoint with diffusers' ``from_single_file`` and saves the pipeline.

    Raises:
        InvalidModel: 400, diffusers cannot read it, or finds no configs for it.
    """
    pipeline = _load(checkpoint, pipeline_class)
    record = replace(record, class_name=type(pipeline).__name__)
    return fill_from_pipeline(entry, record, pipeline)


def read_header(path: Path) -> dict[str, Any]:
    """Returns dtype, shape and offsets of each tensor of a safetensors file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return dict(header)


def _load(checkpoint: Checkpoint, pipeline_class: Any) -> DiffusionPipeline:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    name = pipeline_class
    arguments: dict[str, Any] = {"torch_dtype": _names.resolve_dtype(checkpoint.dtype)}
    if checkpoint.config is not None:
        name = name or class_name(read_classic_index(checkpoint.config, checkpoint.config.name))
        arguments.update(config=str(checkpoint.config), local_files_only=True)
    cls = _names.resolve_pipeline_class(name or diffusers.StableDiffusionPipeline)
    if not hasattr(cls, "from_single_file"):
        raise InvalidModel(checkpoint.path.name, f"cannot become a {cls.__name__}")
    try:
        pipeline: DiffusionPipeline = cls.from_single_file(str(checkpoint.path), **arguments)
    except (
        *(OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError),
        SingleFileComponentError,
    ) as err:
        raise InvalidModel(
            checkpoint.path.name,
            f"could not be read as {cls.__name__}: {err}",
            "pass config= with a folder or a stored model of the same family",
        ) from err
    _check_weights(pipeline, checkpoint.path.name)
    return pipeline


def _check_weights(pipeline: DiffusionPipeline, name: str) -> None:
    """Diffusers leaves parameters on the meta device where a file has no weights for them."""
    import torch

    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and any(p.is_meta for p in module.parameters()):
            raise InvalidModel(
                name, f"lacks weights for {part!r}", "pass config= with a model of its family"
            )


def _find_config(config: str | os.PathLike[str] | None) -> Path | None:
    if config is None:
        return None
    folder = Path(config).expanduser()
    if folder.is_dir():
        read_classic_index(folder, folder.name)
        return folder
    return Path(get(str(config)).path_of(PIPELINE_FOLDER))
