"""Which device a pipeline, or each part of it, is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.options import ModelOptions


def place(
    pipeline: DiffusionPipeline, options: ModelOptions, device: str | torch.device | None
) -> None:
    """Moves a pipeline to its device, whole or part by part.

    Raises:
        InvalidOption: 400, an offload that this machine cannot do.
    """
    kind = options.offload_kind
    if kind == "sequential":
        _offload(pipeline, "enable_sequential_cpu_offload", _device_argument(device))
    elif kind == "model":
        _offload(pipeline, "enable_model_cpu_offload", _device_argument(device))
    elif kind == "group":
        _offload(pipeline, "enable_group_offload", _group_arguments(options, device))
    elif device is not None and options.device_map is None:
        pipeline.to(device)


def _device_argument(device: str | torch.device | None) -> dict[str, Any]:
    return {} if device is None else {"device": device}


def _group_arguments(options: ModelOptions, device: str | torch.device | None) -> dict[str, Any]:
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "onload_device": torch.device(device or default),
        "offload_type": "leaf_level",
        **dict(options.offload_arguments or {}),
    }


def _offload(pipeline: DiffusionPipeline, method: str, arguments: dict[str, Any]) -> None:
    try:
        getattr(pipeline, method)(**arguments)
    except (RuntimeError, ValueError, TypeError) as err:
        raise InvalidOption(method, True, f"a machine that can do it: {err}") from err
