"""The adapters that a model is loaded with, and the finders for those of requests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.adapters.layers import LayerMap
from bentoml_diffusers.adapters.lora import LoraSwitch, supports_lora
from bentoml_diffusers.adapters.reader import convert_lora
from bentoml_diffusers.adapters.records import AdapterSet
from bentoml_diffusers.adapters.sources import AdapterFinder
from bentoml_diffusers.adapters.textual_inversion import load_textual_inversions
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.options import ADAPTER_SOURCES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.sources import Adapter, Kind
    from bentoml_diffusers.options import ModelOptions

logger = logging.getLogger(__name__)

_DEFAULT_SOURCES = ("store", "lora_dir")


def attach_static_adapters(pipeline: DiffusionPipeline, options: ModelOptions) -> LoraSwitch:
    """Loads the adapters of the options, which the operator wrote, so every source is allowed.

    A relative file is looked for in ``lora_dir``, by default the working directory.
    """
    static = find_static_adapters(options)
    load_textual_inversions(pipeline, static.inversions)
    for adapter in static.loras:
        _check_whole(pipeline, adapter, allow_partial=options.allow_partial_lora is True)
    switch = LoraSwitch(pipeline, static.loras)
    if options.fuse_static_loras:
        switch.fuse_static()
    return switch


def _check_whole(pipeline: DiffusionPipeline, adapter: Adapter, *, allow_partial: bool) -> None:
    """Refuses a file of which diffusers would silently apply only a part."""
    path = Path(adapter.path)
    if not (path.is_file() and supports_lora(pipeline)):
        return
    try:
        layers = LayerMap(pipeline)
        raw = convert_lora(
            pipeline, layers, adapter.name, path, adapter.components, allow_partial=True
        )
    except InvalidModel:
        return  # the loader decides: static adapters may be more than requests can use
    if raw.left_out is None:
        return
    if not allow_partial:
        raise raw.left_out.refusal(adapter.name, type(pipeline).__name__)
    logger.warning("LoRA %r is applied in part: %s", adapter.name, raw.left_out)


def find_static_adapters(options: ModelOptions) -> AdapterSet:
    """Finds the adapters of the options; reads no file."""
    folder = Path(options.lora_dir or ".").expanduser()
    inversions = AdapterFinder("textual_inversion", ADAPTER_SOURCES, folder, is_trusted=True)  # type: ignore[arg-type]
    loras = AdapterFinder("lora", ADAPTER_SOURCES, folder, is_trusted=True)  # type: ignore[arg-type]
    return AdapterSet(
        tuple(loras.find_all(options.lora_weights)),
        tuple(inversions.find_all(options.textual_inversions)),
    )


def request_finder(options: ModelOptions, kind: Kind = "lora") -> AdapterFinder:
    """Returns the finder for the adapters of requests, limited to the allowed sources."""
    folder = Path(options.lora_dir).expanduser() if options.lora_dir else None
    return AdapterFinder(kind, options.adapter_sources or _DEFAULT_SOURCES, folder)  # type: ignore[arg-type]
