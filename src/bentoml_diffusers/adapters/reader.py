"""Reads the weights of each layer from a LoRA file with diffusers' own converters.

diffusers converts a file while it loads it into the pipeline's modules. Here its
``load_lora_weights`` runs on a stand-in whose components only record what they are given, so the
pipeline stays unchanged, and every layout that diffusers knows (kohya, XLabs, BFL ...) arrives in
one form, within milliseconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _compat
from bentoml_diffusers.adapters.coverage import (
    layer_of,
    layers_of,
    list_other,
    sources_of,
    trace,
    without_effect,
)
from bentoml_diffusers.adapters.denoisers import loader_arguments
from bentoml_diffusers.adapters.files import read_tensors
from bentoml_diffusers.adapters.lycoris import is_lycoris_of, kind_of
from bentoml_diffusers.adapters.raw import LeftOut, RawLora
from bentoml_diffusers.adapters.reasons import explain
from bentoml_diffusers.adapters.recorder import DOWN, MissingLayer, Recorder
from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.files import TensorFile
    from bentoml_diffusers.adapters.layers import LayerMap

Tensors = dict[str, "torch.Tensor"]


def convert_lora(
    pipeline: DiffusionPipeline,
    layers: LayerMap,
    name: str,
    path: Path,
    components: Sequence[str] = (),
    *,
    allow_partial: bool = False,
) -> RawLora:
    """Reads a LoRA as ``type(pipeline)`` reads it.

    Args:
        pipeline: A pipeline that takes LoRAs; it is not changed.
        layers: Its layers.
        name: Name of the LoRA, for messages.
        path: A safetensors file.
        components: Denoisers that it is for; if empty, the one that diffusers chooses.
        allow_partial: Accept a file of which only a part fits the base model.

    Raises:
        InvalidModel: 400, not a LoRA for this pipeline, or only a part of it fits.
    """
    file = read_tensors(name, path)
    _check_keys(name, list(file.tensors))
    _check_alphas(name, file.tensors)
    kind = kind_of(file.tensors)
    if kind is not None and is_lycoris_of(pipeline, name, file.tensors, components):
        return RawLora(beyond_slots=kind, is_finite=file.is_finite)
    reader = _Reader(pipeline, layers, name, _config_of(pipeline, file), components or ("",))
    raw = reader.read(file.tensors)
    raw.is_finite = file.is_finite
    if not raw.layers and raw.beyond_slots is None and not raw.absent:
        raise InvalidModel(name, f"has no layer in common with {type(pipeline).__name__}")
    other = list_other(file.tensors, raw.used)
    if other:
        reader.account(raw, file.tensors, allow_partial=allow_partial)
    return raw


def _config_of(pipeline: DiffusionPipeline, file: TensorFile) -> Mapping[str, Any] | None:
    """The LoRA config in a file's metadata; diffusers uses it only if it reads the file itself."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    text = file.about.get(LORA_ADAPTER_METADATA_KEY)
    if text:
        config: Mapping[str, Any] = json.loads(text)
        return config
    alpha = _alpha_of(file.about.get("alpha", ""))
    has_own = any(key.endswith(".alpha") for key in file.tensors)
    if alpha is None or has_own or not _compat.reads_alpha_of_file(pipeline):
        return None
    return {f"{name}.lora_alpha": alpha for name in _compat.lora_components(pipeline)}


def _alpha_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Reader:
    """Reads the tensors of one file the way diffusers does."""

    pipeline: DiffusionPipeline
    layers: LayerMap
    name: str
    config: Mapping[str, Any] | None
    components: Sequence[str]

    def read(self, tensors: Tensors) -> RawLora:
        """Runs diffusers' loader."""
        raw = RawLora(has_config=self.config is not None)
        stand_in = _stand_in(self, raw)
        try:
            for component in self.components:
                # Converters scale some tensors in place: each denoiser gets its own copies.
                several = len(self.components) > 1
                given = {key: one.clone() if several else one for key, one in tensors.items()}
                stand_in.load_lora_weights(
                    given, adapter_name="request", **loader_arguments(component)
                )
        except InvalidModel:
            raise
        except MissingLayer as err:
            raise InvalidModel(
                self.name, f"was made for another base model: there is no layer {err}"
            ) from err
        except Exception as err:
            raise InvalidModel(
                self.name, f"is not a LoRA for {type(self.pipeline).__name__}: {explain(err)}"
            ) from err
        return raw

    def account(self, raw: RawLora, file: Tensors, *, allow_partial: bool) -> None:
        """Finds the layers of a file that reached no module, and refuses or records them."""
        traced = self.read(trace(file))
        used, absent = sources_of(traced.used), sources_of(traced.absent)
        left = layers_of(key for key in list_other(file, ()) if key not in used)
        idle = without_effect(file, left)
        lost = [layer for layer in left if layer not in idle]
        again = self._spelled_twice(raw, file, lost) if lost else ()
        lost = [layer for layer in lost if layer not in again]
        if not lost:
            return
        every = len(layers_of(file))
        raw.left_out = LeftOut(tuple(lost), every)
        rest = (key for key in list_other(file, ()) if key not in used | absent)
        unknown = set(lost).intersection(layers_of(rest))
        if (unknown and not allow_partial) or len(lost) == every:
            raise raw.left_out.refusal(self.name, type(self.pipeline).__name__)

    def _spelled_twice(self, raw: RawLora, file: Tensors, lost: Sequence[str]) -> set[str]:
        """Returns those of the ``lost`` layers that the file also holds by the names in use.

        Trainers write some layers twice, for several programs: fused and split, or by the names
        of diffusers and of another program. diffusers takes one of the two.
        """
        rest = {key: file[key] for key in file if layer_of(key) in lost}
        try:
            alone = self.read(trace(rest))
        except InvalidModel:
            return set()
        same: dict[str, bool] = {}
        for component, loras in alone.layers.items():
            for path, lora in loras.items():
                counting = raw.layers.get(component, {}).get(path)
                is_same = counting is not None and counting.adds_the_same(lora)
                for name in layers_of(sources_of([lora.down, lora.up])):
                    same[name] = same.get(name, True) and is_same
        return {name for name, is_same in same.items() if is_same}


def _check_keys(name: str, keys: Sequence[str]) -> None:
    """Refuses keys that diffusers would drop silently, or answer with a misleading error."""
    if not keys:
        raise InvalidModel(name, "is empty")
    if any("dora_scale" in key for key in keys):
        raise InvalidModel(
            name,
            "is a DoRA in kohya's layout, whose magnitudes diffusers drops",
            "save it in diffusers' layout",
        )


def _check_alphas(name: str, tensors: Tensors) -> None:
    """Refuses alphas that send diffusers' converters into an endless loop of halving."""
    for key, tensor in tensors.items():
        if key.endswith("alpha") and tensor.numel() == 1 and not float(tensor) >= 0:
            raise InvalidModel(name, f"holds {key!r} = {float(tensor):g}, which must be positive")


def _stand_in(reader: _Reader, raw: RawLora) -> Any:
    """Returns an object with the loaders of the pipeline's class and recorders for components."""
    pipeline = reader.pipeline
    cls: type[DiffusionPipeline] = type(pipeline)
    stand_in: Any = object.__new__(cls)
    # Tells diffusers that there are no offloading hooks to remove.
    values: dict[str, Any] = {
        "hf_device_map": {},
        "lora_state_dict": _checked_converter(reader, raw),
    }
    for component, module in pipeline.components.items():
        is_module = hasattr(module, "named_modules")
        values[component] = Recorder(component, module, raw) if is_module else module
    stand_in.__dict__.update(values)
    return stand_in


def _checked_converter(reader: _Reader, raw: RawLora) -> Callable[..., Any]:
    """Wraps ``lora_state_dict`` to refuse tensors that would overwrite the base model."""
    loadable = _compat.lora_components(reader.pipeline)
    absent = [name for name in loadable if getattr(reader.pipeline, name, None) is None]

    def lora_state_dict(*args: Any, **kwargs: Any) -> Any:
        answer = reader.pipeline.lora_state_dict(*args, **kwargs)
        state = answer[0] if isinstance(answer, tuple) else answer
        for key in state:
            if "lora" not in key and "lokr" not in key and "alpha" not in key:
                raise InvalidModel(
                    reader.name,
                    f"holds {key!r}, which is not a LoRA",
                    "a request cannot replace weights of the base model",
                )
        for key in [key for key in state if key.partition(".")[0] in absent]:
            raw.absent.append(state.pop(key))
        _check_widths(reader.layers, reader.name, state)
        if isinstance(answer, tuple) and kwargs.get("return_lora_metadata"):
            return (*answer[:-1], reader.config)
        return answer

    return lora_state_dict


def _check_widths(layers: LayerMap, name: str, state: Tensors) -> None:
    """Refuses a LoRA whose input width differs from that of its layer.

    For some transformers diffusers would widen the layer instead (control LoRAs of Flux).
    """
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        layer = rest.removesuffix(DOWN)
        if layer == rest:
            continue
        inputs = getattr(layers.module(component, layer), "in_features", None)
        given = math.prod(tensor.shape[1:])
        if inputs not in (None, given):
            raise InvalidModel(
                name,
                f"was made for another base model: {component}.{layer} takes {inputs} inputs, "
                f"the LoRA {given}",
            )
