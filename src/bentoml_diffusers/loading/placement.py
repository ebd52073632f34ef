"""Puts a pipeline, or each part of it, on its device."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import components_manager
from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.loading.tuning import is_made_of_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.options import ModelOptions

_METHODS = {
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}


def place(
    pipeline: DiffusionPipeline, options: ModelOptions, device: str | torch.device | None
) -> None:
    """Moves a pipeline to its device, whole or part by part.

    Raises:
        InvalidOption: 400, offloading that this machine cannot do.
    """
    from diffusers import DiffusionPipeline

    kind = options.offload_kind
    if kind == "model" and is_made_of_blocks(pipeline):
        enable = components_manager(pipeline).enable_auto_cpu_offload
        _offload("offload", enable, _device_argument(device))
    elif kind in _METHODS:
        _offload(_METHODS[kind], getattr(pipeline, _METHODS[kind]), _device_argument(device))
    elif kind == "group":
        # Modular pipelines lack the method, but have everything that it uses.
        enable = functools.partial(DiffusionPipeline.enable_group_offload, pipeline)
        _offload("enable_group_offload", enable, _group_arguments(options, device))
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


def _offload(option: str, enable: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        enable(**arguments)
    except (RuntimeError, ValueError, TypeError) as err:
        raise InvalidOption(option, True, f"a machine that supports it: {err}") from err
