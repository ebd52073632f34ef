"""Shares components between pipelines: those with equal file hashes are loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidOption
from bentoml_diffusers.store import IP_ADAPTER_FOLDER, complete_record, find_places, hash_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bentoml
    import torch
    from diffusers import ComponentsManager, DiffusionPipeline

    from bentoml_diffusers.options import ModelOptions

# Options that change modules, also for the other pipelines that use them.
_CHANGE_MODULES = (
    *("lora_weights", "textual_inversions", "quantization_config", "layerwise_casting"),
    *("step_cache", "enable_torch_compile", "attention_backend", "enable_xformers"),
    *("enable_attention_slicing", "channels_last", "enable_vae_slicing", "enable_vae_tiling"),
    *("device_map", "offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload"),
)
_KEY = "_bentoml_diffusers_key"


class Shared:
    """The components that one load takes from a components manager, and adds to it.

    Args:
        manager: diffusers' manager; ``None`` shares nothing.
        model: The stored pipeline.
        options: Its options.
        device: Its device.

    Raises:
        InvalidOption: 400, not a manager, or options that would change components of others.
    """

    def __init__(
        self,
        manager: ComponentsManager | None,
        model: bentoml.Model,
        options: ModelOptions,
        device: str | torch.device | None,
    ) -> None:
        self.manager = manager
        self._taken: set[str] = set()
        if manager is None:
            return
        _check(manager, options)
        record = complete_record(Path(model.path))
        if record is None:
            raise InvalidOption(
                "components_manager", manager, f"None: {model.tag} has no hashes; import it again"
            )
        self._files = record.files
        self._classes = record.components
        dtype = _names.resolve_dtype(options.torch_dtype or "float32")
        self._how = (str(dtype), str(options.variant), str(device or "cpu"))

    def take(self, name: str, *, with_adapter: bool = False) -> Any:
        """Returns the equal component of the manager, if any."""
        if self.manager is None:
            return None
        key = self._key(name, with_adapter=with_adapter)
        for component in self.manager.components.values():
            if getattr(component, _KEY, None) == key:
                self._taken.add(name)
                return component
        return None

    def take_all(self, *, with_adapter: bool = False) -> dict[str, Any]:
        """Returns all components of a classic pipeline that the manager has."""
        if self.manager is None:
            return {}
        found = {name: self.take(name, with_adapter=with_adapter) for name in self._classes}
        return {name: component for name, component in found.items() if component is not None}

    def has(self, name: str) -> bool:
        """True if this component was taken."""
        return name in self._taken

    def keep(self, components: Mapping[str, Any], *, with_adapter: bool = False) -> None:
        """Adds components to the manager, for later loads."""
        for name, component in components.items():
            if self.manager is not None and _is_stateless(component):
                setattr(component, _KEY, self._key(name, with_adapter=with_adapter))

    def keep_classic(self, pipeline: DiffusionPipeline, *, with_adapter: bool = False) -> None:
        """Adds the components of a classic pipeline, which knows no managers."""
        if self.manager is None:
            return
        named = {key: pipeline.components.get(key) for key in self._classes}
        there = {key: component for key, component in named.items() if component is not None}
        for name, component in there.items():
            self.manager.add(name, component)
        self.keep(there, with_adapter=with_adapter)

    def _key(self, name: str, *, with_adapter: bool) -> tuple[str, ...]:
        class_name = self._classes.get(name, "")
        names = sorted(self._files)
        places = find_places(name, name, class_name.rpartition(".")[2], names)
        paths = [path for place in places for path in place]
        if with_adapter and name == "unet":
            paths += [path for path in names if path.startswith(f"{IP_ADAPTER_FOLDER}/")]
        return (hash_tree({path: self._files[path] for path in paths}), class_name, *self._how)


def _check(manager: Any, options: ModelOptions) -> None:
    from diffusers import ComponentsManager

    if not isinstance(manager, ComponentsManager):
        raise InvalidOption("components_manager", manager, "a diffusers.ComponentsManager")
    for name in _CHANGE_MODULES:
        if getattr(options, name):
            raise InvalidOption(
                "components_manager",
                name,
                f"only options that do not change shared modules, as {name} does",
            )


def _is_stateless(component: Any) -> bool:
    """False for components with the state of a call: schedulers and guiders."""
    from diffusers import SchedulerMixin
    from diffusers.guiders import BaseGuidance

    return not isinstance(component, (SchedulerMixin, BaseGuidance))
