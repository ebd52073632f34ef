"""Checks tensors in a request: encoded text or images, latents, masks.

Pipelines accept any, and fail deep inside. The widths in the denoiser's config are checked before
the request is queued; a failure in the call is blamed on the caller's tensors as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bentoml_diffusers.errors import InvalidRequest, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffusers import DiffusionPipeline

# Keys in a denoiser's config with the width of encoded text, and of its pooled form.
_TEXT_WIDTHS = {
    "FluxTransformer2DModel": "joint_attention_dim",
    "QwenImageTransformer2DModel": "joint_attention_dim",
    "SD3Transformer2DModel": "joint_attention_dim",
    "UNet2DConditionModel": "cross_attention_dim",
    "WanTransformer3DModel": "text_dim",
    "WanVACETransformer3DModel": "text_dim",
}
_POOLED_WIDTHS = {
    "FluxTransformer2DModel": "pooled_projection_dim",
    "SD3Transformer2DModel": "pooled_projection_dim",
}
_TEXT = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# Packages whose code fails on a tensor that does not fit.
_LIBRARIES = ("torch", "diffusers", "transformers", "PIL", "numpy")
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def check_tensors(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Checks the tensors and arrays of a request.

    Raises:
        InvalidRequest: 400, one is empty, has NaN or infinity, or another width than the denoiser
            reads.
    """
    for name, value in arguments.items():
        for tensor in _tensors_of(value):
            if not tensor.numel():
                raise InvalidRequest(name, tuple(tensor.shape), "a tensor that is not empty")
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise InvalidRequest(name, "NaN or infinity", "finite numbers")
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    for names, widths, text in (
        (_TEXT, _TEXT_WIDTHS, "(prompts, tokens, {})"),
        (_POOLED, _POOLED_WIDTHS, "(prompts, {})"),
    ):
        width = _read_width(denoiser, widths)
        for name in names:
            value = arguments.get(name)
            if width is None or not isinstance(value, torch.Tensor):
                continue
            if value.ndim != text.count(",") + 1 or value.shape[-1] != width:
                raise InvalidRequest(name, tuple(value.shape), f"shape {text.format(width)}")


def blame_tensors(error: BaseException, arguments: Mapping[str, Any]) -> InvalidRequest | None:
    """Returns the error as the caller's fault, if a library failed on one of the caller's tensors.

    Args:
        error: The error that a pipeline raised before its second step.
        arguments: Arguments of the request.
    """
    shapes = {name: _shapes_of(value) for name, value in arguments.items()}
    given: dict[str, Any] = {name: shape for name, shape in shapes.items() if shape is not None}
    if not given or not isinstance(error, _ERRORS) or not _is_of_library(error):
        return None
    reason = shorten(str(error).partition("\n")[0])
    field, got = next(iter(given.items())) if len(given) == 1 else ("arguments", given)
    return InvalidRequest(field, got, f"a tensor that fits the model: {reason}")


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_of(item)


def _read_width(denoiser: Any, widths: Mapping[str, str]) -> int | None:
    config = getattr(denoiser, "config", None)
    width = getattr(config, widths.get(type(denoiser).__name__, ""), None)
    projects = getattr(config, "encoder_hid_dim", None) is not None
    return width if isinstance(width, int) and not projects else None


def _is_of_library(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return str(module).partition(".")[0] in _LIBRARIES


def _shapes_of(value: Any) -> Any:
    shapes = [tuple(tensor.shape) for tensor in _tensors_of(value)]
    is_list = isinstance(value, (list, tuple))
    return shapes if is_list and shapes else next(iter(shapes), None)
