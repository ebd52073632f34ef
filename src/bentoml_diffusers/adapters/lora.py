"""LoRAs through PEFT: static ones that stay, and those of one request at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _compat
from bentoml_diffusers._compat import tuner_layer
from bentoml_diffusers.adapters.denoisers import (
    check_components,
    loader_arguments,
    standing_for,
)
from bentoml_diffusers.adapters.files import read_tensors
from bentoml_diffusers.adapters.lycoris import inject, is_lycoris_of, kind_of, read_lycoris
from bentoml_diffusers.adapters.peft_state import note_state
from bentoml_diffusers.adapters.reasons import explain
from bentoml_diffusers.adapters.scales import expand_scales, scale_of
from bentoml_diffusers.adapters.storage import is_computed_in, name_storage
from bentoml_diffusers.errors import (
    DiffusersError,
    InvalidModel,
    InvalidOption,
    UnsupportedByPipeline,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.peft_state import LayerState
    from bentoml_diffusers.adapters.scales import LayerScales, Scale
    from bentoml_diffusers.adapters.sources import Adapter

_compat.quiet_lora_loading()


class LoraSwitch:
    """Switches LoRAs of one pipeline. Not thread-safe: one request at a time.

    Args:
        pipeline: The pipeline whose components get the LoRAs. Existing LoRAs stay.
        static: LoRAs that stay active, in addition to those of a request.

    Raises:
        UnsupportedByPipeline: 400, static LoRAs for a class without LoRA.
        InvalidModel: 400, a file that is not a LoRA for this pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline, static: Sequence[Adapter] = ()) -> None:
        self._pipeline = pipeline
        self._counter = itertools.count()
        self._static: dict[str, Scale] = {}
        self._before = _resident(pipeline)
        for adapter in static:
            check_choices(pipeline, "lora_weights", adapter)
            self._static |= dict.fromkeys(self._load(adapter), adapter.scale)
        self._activate(self._static)
        self.is_fused = False

    @property
    def has_layers(self) -> bool:
        """True if there are static LoRAs that are not fused, so PEFT's layers are present."""
        return bool(self._static or self._before)

    @contextlib.contextmanager
    def applied(self, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Adds ``adapters`` to the static ones for the block; always restores the state before.

        That includes what a call with a scale changes in the layers of static LoRAs.

        Raises:
            InvalidModel: 400, a file that is not a LoRA for this pipeline.
            UnsupportedByPipeline: 400, the pipeline's class takes no LoRA.
        """
        wanted = [adapter for adapter in adapters if adapter.scale != 0]
        before = note_state(_modules(self._pipeline)) if self.has_layers else []
        try:
            loaded = {name: one.scale for one in wanted for name in self._load(one)}
            self._add(loaded, before)
            yield
        finally:
            for state in before:  # before the rest: PEFT warns if an active adapter is deleted
                state.restore()
            if wanted:
                self._remove_all_but_static()
                for state in before:
                    state.restore()

    def _add(self, loaded: Mapping[str, Scale], before: Sequence[LayerState]) -> None:
        if not loaded:
            return
        here = {name for state in before for name in state.active if not state.is_disabled}
        self._activate({**dict.fromkeys(sorted(here), 1.0), **loaded})
        for state in before:
            state.restore_scaling()

    def fuse_static(self) -> None:
        """Adds the static LoRAs to the base weights, permanently.

        Raises:
            InvalidOption: 400, the weights are quantized.
        """
        if not self._static:
            return
        parts = [name for name, here in self._pipeline.get_list_adapters().items() if here]
        for storage in _storages(self._pipeline):
            # PEFT changes a copy of such weights, drops DoRA's magnitudes, or raises.
            raise InvalidOption(
                "fuse_static_loras", True, f"a model whose weights are not stored as {storage}"
            )
        self._pipeline.fuse_lora(components=parts, adapter_names=list(self._static))
        self._pipeline.unload_lora_weights()
        self._static = {}
        self.is_fused = True

    def _load(self, adapter: Adapter) -> list[str]:
        """Loads one LoRA; returns the names of its PEFT adapters."""
        if not supports_lora(self._pipeline):
            raise UnsupportedByPipeline(type(self._pipeline).__name__, "LoRA")
        name = f"lora_{next(self._counter)}"
        try:
            names = self._inject(adapter, name)
        except DiffusersError:
            raise
        except Exception as err:
            # A client sees this text: it must not contain a path of the server.
            reason = explain(err, adapter.path, adapter.name)
            base = f"{_first_quantized(self._pipeline)}{type(self._pipeline).__name__}"
            raise InvalidModel(adapter.name, f"is not a LoRA for {base}: {reason}") from err
        if not set(names) <= _resident(self._pipeline):
            raise InvalidModel(
                adapter.name, f"has no layer in common with {type(self._pipeline).__name__}"
            )
        for one in names:
            _check_precision(self._pipeline, adapter.name, one)
        return names

    def _inject(self, adapter: Adapter, name: str) -> list[str]:
        path = Path(adapter.path)
        tensors = read_tensors(adapter.name, path).tensors if path.is_file() else {}
        is_lycoris = kind_of(tensors) is not None and is_lycoris_of(
            self._pipeline, adapter.name, tensors, adapter.components
        )
        names = {name} if not is_lycoris else set()
        for component in adapter.components or ("",):
            if is_lycoris:
                denoiser = standing_for(self._pipeline, component)
                layers = read_lycoris(denoiser, adapter.name, tensors)
                names.update(inject(denoiser, layers, name))
            else:
                arguments = {**adapter.arguments, **loader_arguments(component)}
                self._pipeline.load_lora_weights(
                    adapter.path, adapter_name=name, use_safetensors=True, **arguments
                )
        return sorted(names)

    def _activate(self, scales: Mapping[str, Scale]) -> None:
        if not scales:
            return
        plain = [scale if isinstance(scale, float) else 1.0 for scale in scales.values()]
        self._pipeline.set_adapters(list(scales), plain)
        for name, scale in scales.items():
            if isinstance(scale, Mapping):
                _set_scales(self._pipeline, name, expand_scales(self._pipeline, "scale", scale))

    def _remove_all_but_static(self) -> None:
        if not self.has_layers:
            self._pipeline.unload_lora_weights()
            return
        kept = self._before | set(self._static)
        extra = sorted(_resident(self._pipeline) - kept)
        if extra:
            self._pipeline.delete_adapters(extra)
        for component in _modules(self._pipeline):
            _unwrap_empty_layers(component)


def check_choices(
    pipeline: DiffusionPipeline,
    field: str,
    adapter: Adapter,
    paths_of: Callable[[str], Iterable[str]] | None = None,
) -> None:
    """Refuses scales for components and blocks that the pipeline does not have.

    Raises:
        InvalidRequest: 400, there is no such component or block.
    """
    check_components(pipeline, f"{field}.components", adapter.components)
    if isinstance(adapter.scale, Mapping):
        expand_scales(pipeline, f"{field}.scale", adapter.scale, paths_of)


def supports_lora(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
    """True if the pipeline, or its class, takes LoRAs, by any loader mixin of diffusers."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    return issubclass(cls, LoraBaseMixin)


def _set_scales(pipeline: DiffusionPipeline, name: str, scales: LayerScales) -> None:
    for place, layer in _wrappers(pipeline):
        component, _, path = place.partition(".")
        if name in _adapters_of(layer):
            layer.set_scale(name, scale_of(scales, component, path))


def _wrappers(pipeline: DiffusionPipeline) -> Iterator[tuple[str, Any]]:

    for component in pipeline.get_list_adapters():
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, tuner_layer()):
                yield f"{component}.{path}", layer


def _storages(pipeline: DiffusionPipeline) -> Iterator[str]:
    """Yields the storage format of layers with adapters whose weights cannot be added to."""
    return (storage for _, layer in _wrappers(pipeline) if (storage := name_storage(layer)))


def _first_quantized(pipeline: DiffusionPipeline) -> str:
    is_quantized = any(
        getattr(getattr(part, "config", None), "quantization_config", None)
        for part in _modules(pipeline)
    )
    return "a quantized " if is_quantized else ""


def _check_precision(pipeline: DiffusionPipeline, name: str, adapter_name: str) -> None:
    """Refuses an adapter that PEFT rounded to the dtype in which a layer stores its weight.

    Raises:
        InvalidModel: 400, PEFT rounded it.
    """
    for path, layer in _wrappers(pipeline):
        if any(not is_computed_in(one.dtype) for one in _weights_of(layer, adapter_name)):
            raise InvalidModel(
                name,
                f"would be rounded to {name_storage(layer)}, the dtype that {path} is stored in",
                "load the model without layerwise_casting, or use a plain LoRA per request",
            )


def _weights_of(layer: Any, adapter_name: str) -> Iterator[torch.Tensor]:
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute, {})
        if adapter_name in held:
            part = held[adapter_name]
            yield from part.parameters() if hasattr(part, "parameters") else [part]


def _resident(pipeline: DiffusionPipeline) -> set[str]:
    if not supports_lora(pipeline):
        return set()
    lists: dict[str, list[str]] = pipeline.get_list_adapters()
    return {name for names in lists.values() for name in names}


def _modules(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    import torch

    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def _unwrap_empty_layers(module: torch.nn.Module) -> None:
    """Restores the plain layer where a wrapper has no adapter left.

    ``delete_adapters`` leaves the wrappers, so the keys of the state dict would stay changed.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, tuner_layer()) and not _adapters_of(child):
                # Its direct base, which may be the wrapper of a static adapter of another kind.
                setattr(parent, name, child.base_layer)


def _adapters_of(layer: Any) -> set[str]:
    return {key for attribute in layer.adapter_layer_names for key in getattr(layer, attribute, ())}
