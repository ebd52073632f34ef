"""Options that trade memory, speed and precision, each as one step on a loaded pipeline."""

from __future__ import annotations

import dataclasses
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers._compat import has_repeated_blocks, takes_attention_backend
from bentoml_diffusers.errors import InvalidOption, UnsupportedByPipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModularPipeline

    from bentoml_diffusers.options import ModelOptions

logger = logging.getLogger(__name__)

_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder", "prior_prior")

# The view that runs in this thread, for step caches that need its timestep.
running_pipeline: ContextVar[Any] = ContextVar("running_pipeline")


def denoiser_names(pipeline: DiffusionPipeline) -> list[str]:
    """Returns the names of the components that denoise."""
    found = [name for name in _DENOISERS if getattr(pipeline, name, None) is not None]
    if found:
        return found
    # Otherwise the last one before the VAE in the order of offloading.
    order = getattr(type(pipeline), "model_cpu_offload_seq", None) or ""
    others = [
        name
        for name in order.split("->")
        if name and not name.startswith(("vae", "vqvae", "text_", "image_", "vocoder"))
    ]
    return [name for name in others[-1:] if getattr(pipeline, name, None) is not None]


def set_attention(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """xformers, attention in slices, or another backend for attention.

    Raises:
        InvalidOption: 400, xformers or the backend is not available.
        UnsupportedByPipeline: 400, no denoiser that supports it.
    """
    if options.enable_xformers:
        try:
            for part in _whole_or_denoisers(pipeline, "enable_xformers"):
                part.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as err:
            raise InvalidOption("enable_xformers", True, f"xformers and a GPU: {err}") from err
    if options.enable_attention_slicing is not None:
        if is_made_of_blocks(pipeline):
            for denoiser in _denoisers(pipeline, "enable_attention_slicing"):
                value = options.enable_attention_slicing
                _call(denoiser, "set_attention_slice", "enable_attention_slicing", value)
        else:
            pipeline.enable_attention_slicing(options.enable_attention_slicing)
    if options.attention_backend is not None:
        for denoiser in _denoisers(pipeline, "attention_backend"):
            _set_backend(denoiser, options.attention_backend)


def set_vae(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """Decodes images one by one, or tile by tile.

    Raises:
        UnsupportedByPipeline: 400, no VAE that supports it.
    """
    for name, method in (
        ("enable_vae_slicing", "enable_slicing"),
        ("enable_vae_tiling", "enable_tiling"),
    ):
        if getattr(options, name):
            vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
            if not hasattr(vae, method):
                raise UnsupportedByPipeline(type(pipeline).__name__, name)
            getattr(vae, method)()


def set_memory_format(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """Puts the channels of convolution weights last."""
    import torch

    if options.channels_last:
        for name in (*denoiser_names(pipeline), "vae", "vqvae", "controlnet"):
            module = getattr(pipeline, name, None)
            if isinstance(module, torch.nn.Module):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cast_layers(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """Keeps the denoiser's weights in a smaller dtype, cast layer by layer for use.

    Raises:
        InvalidOption: 400, not a dtype.
        UnsupportedByPipeline: 400, no denoiser that supports it.
    """
    if options.layerwise_casting is None:
        return
    storage = _names.resolve_dtype(options.layerwise_casting, option="layerwise_casting")
    for denoiser in _denoisers(pipeline, "layerwise_casting"):
        if not hasattr(denoiser, "enable_layerwise_casting"):
            raise UnsupportedByPipeline(type(pipeline).__name__, "layerwise_casting")
        denoiser.enable_layerwise_casting(storage_dtype=storage, compute_dtype=denoiser.dtype)


def use_step_cache(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """Reuses what the denoiser computed in earlier steps; images change a little.

    Raises:
        InvalidOption: 400, no such cache, or a wrong setting.
        UnsupportedByPipeline: 400, the denoiser supports no cache.
    """
    if options.step_cache is None:
        return
    given: dict[str, Any] = (
        {"name": options.step_cache}
        if isinstance(options.step_cache, str)
        else {**options.step_cache}
    )
    config_class = _names.resolve_step_cache(given.pop("name", None))
    known = {item.name for item in dataclasses.fields(config_class)}
    if "current_timestep_callback" in known:
        if is_made_of_blocks(pipeline) and "current_timestep_callback" not in given:
            # The timestep is a local variable of a block.
            raise UnsupportedByPipeline(type(pipeline).__name__, f"step_cache {options.step_cache}")
        given.setdefault(
            "current_timestep_callback",
            lambda: running_pipeline.get(pipeline).current_timestep,
        )
    for name in given:
        if name not in known:
            raise InvalidOption("step_cache", name, f"its settings: {', '.join(sorted(known))}")
    for denoiser in _denoisers(pipeline, "step_cache"):
        if not hasattr(denoiser, "enable_cache"):
            raise UnsupportedByPipeline(type(pipeline).__name__, "step_cache")
        _call(denoiser, "enable_cache", "step_cache", config_class(**given))


def compile_denoiser(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    """Compiles the denoiser on its first run: as a whole, or each kind of block once.

    Raises:
        UnsupportedByPipeline: 400, no denoiser, or no blocks that repeat.
    """
    if not options.enable_torch_compile:
        return
    for denoiser in _denoisers(pipeline, "enable_torch_compile"):
        logger.info("compiling %s on its first run", type(denoiser).__name__)
        if options.enable_torch_compile != "blocks":
            # In place: a wrapper module would hide the denoiser from adapters and from saving.
            denoiser.compile()
        elif has_repeated_blocks(denoiser):
            denoiser.compile_repeated_blocks()
        else:
            raise UnsupportedByPipeline(type(denoiser).__name__, "enable_torch_compile='blocks'")


def is_made_of_blocks(pipeline: DiffusionPipeline | ModularPipeline) -> bool:
    """True for a modular pipeline; it has few of the methods of a classic one."""
    from diffusers import ModularPipeline

    return isinstance(pipeline, ModularPipeline)


def _whole_or_denoisers(pipeline: DiffusionPipeline, option: str) -> list[Any]:
    return _denoisers(pipeline, option) if is_made_of_blocks(pipeline) else [pipeline]


def _denoisers(pipeline: DiffusionPipeline, option: str) -> list[Any]:
    found = [getattr(pipeline, name) for name in denoiser_names(pipeline)]
    if not found:
        raise UnsupportedByPipeline(type(pipeline).__name__, option)
    return found


def _set_backend(denoiser: Any, backend: str) -> None:
    _call(denoiser, "set_attention_backend", "attention_backend", backend)
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(takes_attention_backend(processor) for processor in processors):
        # diffusers gives no error then, as for the attention of UNets in 0.42.1
        raise UnsupportedByPipeline(type(denoiser).__name__, "attention_backend")


def _call(target: Any, method: str, option: str, value: Any) -> None:
    if not hasattr(target, method):
        raise UnsupportedByPipeline(type(target).__name__, option)
    try:
        getattr(target, method)(value)
    except (ValueError, RuntimeError, ImportError, TypeError) as err:
        raise InvalidOption(option, value, f"one that works here: {err}") from err
