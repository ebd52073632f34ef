"""The layers of a base model that can take LoRAs, and whether a LoRA fits them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import execution_device, is_compiled
from bentoml_diffusers.adapters.files import extend_key, is_finite
from bentoml_diffusers.adapters.scales import scale_of
from bentoml_diffusers.adapters.storage import base_of, is_computed_in
from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.raw import LayerLora, LeftOut, RawLora
    from bentoml_diffusers.adapters.scales import LayerScales

LayerKey = tuple[str, str]
LayerWeights = tuple["torch.Tensor", "torch.Tensor", float]


@dataclass(frozen=True)
class Target:
    """A layer that a slot can serve.

    Attributes:
        module: The module that is called: the layer, or the wrapper of a static LoRA around it.
        dtype: The dtype that it computes in.
        inputs: Width of the first matrix: input channels x kernel size.
        outputs: Output channels.
        convolution: Arguments of the convolution, ``None`` for a linear layer.
        kernel: Its kernel, empty for a linear layer.
        channels: Input channels.
    """

    module: torch.nn.Module
    dtype: torch.dtype
    inputs: int
    outputs: int
    channels: int
    kernel: tuple[int, ...] = ()
    convolution: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class HostLora:
    """A validated LoRA in host memory, in the form that slots hold.

    Attributes:
        name: As it was asked for.
        layers: For each layer ``down`` of shape ``(rank, inputs)``, ``up`` of shape ``(outputs,
            rank)``, both in the layer's dtype, and the factor alpha / rank.
        rank: The largest rank of a layer.
        n_bytes: Size of its tensors.
        beyond_slots: The part that only PEFT can apply; if set, ``layers`` is empty.
        left_out: Layers of the file that the base model does not have; ``None``: none.
        key: Key of the file's content, see :class:`FileKey`.
    """

    name: str
    layers: Mapping[LayerKey, LayerWeights]
    rank: int
    n_bytes: int
    beyond_slots: str | None = None
    left_out: LeftOut | None = None
    key: object = None

    def scaled(self, scales: LayerScales) -> HostLora:
        """Returns a scaled copy for a slot of its own; shares the tensors."""
        layers = {}
        for (component, path), (down, up, factor) in self.layers.items():
            scale = scale_of(scales, component, path)
            if scale != 0:
                layers[component, path] = (down, up, factor * scale)
        return replace(self, layers=layers, key=extend_key(self.key, repr(scales)))


class LayerMap:
    """The layers of a pipeline that can take a LoRA, in their current state."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        import torch

        self._pipeline = pipeline
        self._modules = {
            name: dict(part.named_modules())
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }
        self._targets: dict[LayerKey, Target | None] = {}
        self._device: torch.device | None = None

    def find(self, component: str, path: str) -> Target | None:
        """Returns the layer; ``None`` if slots cannot serve its kind.

        Raises:
            KeyError: There is no such layer.
        """
        key = (component, path)
        if key not in self._targets:
            self._targets[key] = _target(self._modules[component][path], self._pipeline)
        return self._targets[key]

    def module(self, component: str, path: str) -> torch.nn.Module | None:
        """Returns the module at a path, if any."""
        return self._modules.get(component, {}).get(path)

    def paths(self, component: str) -> list[str]:
        """Returns the paths of all modules of a component."""
        return list(self._modules.get(component, ()))

    def keys(self, component: str) -> list[LayerKey]:
        """Returns all layers of a component that slots can serve."""
        paths = self._modules.get(component, {})
        return [(component, path) for path in paths if self.find(component, path) is not None]

    def is_compiled(self, component: str) -> bool:
        """True if ``torch.compile`` is on for the component or for a part of it."""
        module = self.module(component, "")
        return module is not None and is_compiled(module)

    def servable(self, key: LayerKey) -> Target:
        """Returns a layer that slots can serve."""
        target = self.find(*key)
        if target is None:
            raise KeyError(key)
        return target

    def fit(self, name: str, raw: RawLora, max_rank: int, *, check_finite: bool) -> HostLora:
        """Checks a LoRA against the base model and converts it to the form of slots.

        Raises:
            InvalidModel: 400, a layer is missing, has another shape, or the LoRA has too high a
                rank or holds values that are not finite.
        """
        layers, beyond = {}, raw.beyond_slots
        for component, path, lora in _each(raw):
            target = self._checked(name, component, path, lora)
            if target is None:
                kind = type(base_of(self._modules[component][path])).__name__
                beyond = f"a LoRA of a {kind}"
            else:
                layers[component, path] = self._converted(target, lora)
        if beyond is not None:
            if check_finite and not raw.is_finite:
                raise InvalidModel(name, "holds NaN or infinity")
            return HostLora(name, {}, 0, 0, beyond, raw.left_out)
        # A finite number of the file may overflow in a smaller dtype.
        if check_finite and not (raw.is_finite and _are_as_in_file(raw, layers)):
            _check_finite(name, layers)
        rank = max((down.shape[0] for down, _, _ in layers.values()), default=0)
        if rank > max_rank:
            raise InvalidModel(
                name, f"has rank {rank}, more than max_lora_rank={max_rank}", "raise max_lora_rank"
            )
        n_bytes = sum(_size(layer) for layer in layers.values())
        return HostLora(name, layers, rank, n_bytes, left_out=raw.left_out)

    @property
    def device(self) -> torch.device:
        """Returns where layers run; their weights may be elsewhere while offloaded."""
        if self._device is None:
            self._device = execution_device(self._pipeline)
        return self._device

    def _checked(self, name: str, component: str, path: str, lora: LayerLora) -> Target | None:
        try:
            target = self.find(component, path)
        except KeyError:
            raise InvalidModel(
                name, f"was made for another base model: there is no layer {component}.{path}"
            ) from None
        if target is None:
            return None
        rank, *down = lora.down.shape
        fits_in = down == [target.channels, *target.kernel] or (
            not target.kernel and math.prod(down) == target.inputs
        )
        outputs = lora.up.shape[0]
        fits_out = outputs == target.outputs and lora.up.numel() == outputs * rank
        if not (fits_in and fits_out):
            raise InvalidModel(
                name,
                f"was made for another base model: {component}.{path} maps {target.channels} to "
                f"{target.outputs} channels, the LoRA has the shapes {tuple(lora.down.shape)} and "
                f"{tuple(lora.up.shape)}",
            )
        return target

    def _converted(self, target: Target, lora: LayerLora) -> LayerWeights:
        dtype = target.dtype
        down, up = lora.down, lora.up
        if down.dtype != dtype or up.dtype != dtype:
            down, up = down.to(dtype), up.to(dtype)
        return down.flatten(1), up.flatten(1), lora.factor


def _target(module: torch.nn.Module, pipeline: DiffusionPipeline) -> Target | None:
    import torch

    base = base_of(module)
    if isinstance(base, torch.nn.Linear):
        inputs, outputs = base.in_features, base.out_features
        return Target(module, _dtype_of(base, pipeline), inputs, outputs, inputs)
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    if not isinstance(base, kinds) or base.groups != 1 or base.padding_mode != "zeros":
        return None
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    kernel = tuple(base.kernel_size)
    inputs = base.in_channels * math.prod(kernel)
    dtype = _dtype_of(base, pipeline)
    return Target(module, dtype, inputs, base.out_channels, base.in_channels, kernel, geometry)


def _dtype_of(layer: torch.nn.Module, pipeline: DiffusionPipeline) -> torch.dtype:
    """The dtype in which a layer computes; its weights may be stored in a smaller one."""
    import torch

    stored, whole = getattr(layer.weight, "dtype", None), pipeline.dtype
    if isinstance(stored, torch.dtype) and is_computed_in(stored):
        return stored
    return whole if is_computed_in(whole) else torch.bfloat16


def _each(raw: RawLora) -> Iterator[tuple[str, str, LayerLora]]:
    for component, loras in raw.layers.items():
        for path, lora in loras.items():
            yield component, path, lora


def _are_as_in_file(raw: RawLora, layers: Mapping[LayerKey, LayerWeights]) -> bool:
    return all(
        lora.down.dtype == lora.up.dtype == layers[component, path][0].dtype
        for component, path, lora in _each(raw)
    )


def _check_finite(name: str, layers: Mapping[LayerKey, LayerWeights]) -> None:
    for (component, path), (down, up, _) in layers.items():
        if not (is_finite(down) and is_finite(up)):
            raise InvalidModel(name, f"holds NaN or infinity in {component}.{path}")


def _size(layer: LayerWeights) -> int:
    down, up, _ = layer
    return down.numel() * down.element_size() + up.numel() * up.element_size()
