"""Describes the LoRA or textual inversion in a file, without loading a pipeline."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel, ModelNotFound
from bentoml_diffusers.store.embedding_files import read_embedding_layout
from bentoml_diffusers.store.sources import PICKLE_SUFFIXES, read_pickle

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_DOWN_KEYS = (".lora_A.", ".lora_down.", ".lora.down.", "_lora.down.", ".hada_w1_b", ".lokr_w1_b")
_LORA_KEYS = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "lokr_", "hada_")
_WORD_KEYS = ("modelspec.trigger_phrase", "trigger_words", "ss_trigger_words", "trained_words")
_MAX_WORDS = 20
_COMPONENTS = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "transformer.": "transformer",
    "diffusion_model.": "transformer",
    "unet.": "unet",
}
_CROSS_ATTENTION = {768: "stable-diffusion-1", 1024: "stable-diffusion-2", 2048: "sdxl"}


@dataclass(frozen=True)
class AdapterFile:
    """Names and shapes of an adapter's tensors, its scalar values, and the file's metadata."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    scalars: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The base model that the file's metadata names."""
        keys = ("ss_sd_model_name", "ss_base_model_version", "base_model")
        return next((self.metadata[key] for key in keys if self.metadata.get(key)), None)


def read_adapter(path: Path) -> AdapterFile:
    """Reads names, shapes and metadata of a file.

    Raises:
        ModelNotFound: 404, no such file.
        InvalidModel: 400, broken, truncated, or of another format.
    """
    if not path.is_file():
        raise ModelNotFound(path.name, "is not a file", "check the path")
    if path.suffix in PICKLE_SUFFIXES:
        tensors = read_pickle(path, path.name)
        return AdapterFile(
            path.name,
            {key: tuple(value.shape) for key, value in tensors.items()},
            {key: float(value) for key, value in tensors.items() if value.numel() == 1},
        )
    if path.suffix != ".safetensors":
        raise InvalidModel(path.name, "is not a .safetensors file", "convert it to safetensors")
    return _read_safetensors(path)


def describe_lora(adapter: AdapterFile) -> dict[str, Any]:
    """Returns what the file tells: architecture, rank, alpha, modules, trigger words.

    Raises:
        InvalidModel: 400, no tensor has the name of a LoRA weight.
    """
    if not any(part in key for key in adapter.shapes for part in _LORA_KEYS):
        raise InvalidModel(adapter.name, "holds no LoRA: no tensor has the name of a LoRA weight")
    down = {
        key: shape
        for key, shape in adapter.shapes.items()
        if any(part in key for part in _DOWN_KEYS)
    }
    ranks = sorted({shape[0] for shape in down.values() if shape})
    modules = [re.split(r"\.(?:lora|hada|lokr)|_lora\.", key)[0] for key in down]
    return {
        "architecture": _architecture(adapter, down),
        "rank": max(ranks, default=None),
        "alpha": _alpha(adapter),
        "components": dict(Counter(_component(key) for key in modules)),
        "modules": sorted({_leaf(key) for key in modules}),
        "trigger_words": _trigger_words(adapter.metadata),
        "tensors": len(adapter.shapes),
    }


def describe_embedding(adapter: AdapterFile, token: str | None) -> dict[str, Any]:
    """Returns token, number of vectors and their length, also by component if the file says it.

    Raises:
        InvalidModel: 400, tensors that are not vectors, or no token.
    """
    layout = read_embedding_layout(adapter.name, adapter.shapes)
    shapes = {part: adapter.shapes[key] for part, key in layout.keys.items()}
    if any(len(shape) > 2 for shape in shapes.values()):
        raise InvalidModel(adapter.name, "holds no textual inversion: its tensors are not vectors")
    token = token or layout.token
    if token is None:
        raise InvalidModel(adapter.name, "does not name its token", "give token=")
    shape = next(iter(shapes.values()))
    return {
        "token": token,
        "vectors": shape[0] if len(shape) == 2 else 1,
        "length": shape[-1],
        "architecture": "sdxl" if len(shapes) > 1 else _CROSS_ATTENTION.get(shape[-1]),
        "components": {part: shape[-1] for part, shape in shapes.items() if part is not None},
    }


def _read_safetensors(path: Path) -> AdapterFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            keys = list(tensors.keys())
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
            alphas = [key for key in keys if key.endswith(".alpha") and not shapes[key]]
            scalars = {key: float(tensors.get_tensor(key)) for key in alphas}
            return AdapterFile(path.name, shapes, scalars, tensors.metadata() or {})
    except (SafetensorError, ValueError) as err:
        raise InvalidModel(
            path.name, f"is broken or truncated: {err}", "download or save it again"
        ) from err


def _architecture(adapter: AdapterFile, down: Mapping[str, tuple[int, ...]]) -> str | None:
    """From the metadata, else from the width of the text embeddings in cross-attention."""
    stated = adapter.metadata.get("modelspec.architecture")
    if stated:
        return stated.removesuffix("/lora")
    keys = " ".join(down)
    if "double_blocks" in keys or "single_transformer_blocks" in keys:
        return "flux"
    if "joint_blocks" in keys or "add_k_proj" in keys:
        return "stable-diffusion-3"
    widths = {shape[1] for key, shape in down.items() if re.search(r"attn2[._]to_[kv]", key)}
    if len(widths) != 1:
        return None
    width = widths.pop()
    return _CROSS_ATTENTION.get(width, f"unet with text embeddings of width {width}")


def _alpha(adapter: AdapterFile) -> float | None:
    values = {value for key, value in adapter.scalars.items() if key.endswith("alpha")}
    if values:
        return max(values)
    config = _parse(adapter.metadata.get("lora_adapter_metadata"))
    stated = [value for key, value in config.items() if key.endswith("lora_alpha")]
    stated = stated or [adapter.metadata.get("ss_network_alpha")]
    return float(stated[0]) if stated[0] not in (None, "None") else None


def _component(key: str) -> str:
    return next((name for prefix, name in _COMPONENTS.items() if key.startswith(prefix)), "unet")


def _leaf(key: str) -> str:
    """``to_q`` of ``unet.down.attn1.to_q`` and of ``lora_unet_down_attn1_to_q``."""
    found = re.search(
        r"(to_out[._]0|to_[qkv]|add_[qkv]_proj|proj_(?:in|out)|[qkvo](?:ut)?_proj|fc[12])$", key
    )
    return found.group(1).replace("_0", ".0") if found else key.rpartition(".")[2]


def _trigger_words(metadata: Mapping[str, str]) -> list[str]:
    for key in _WORD_KEYS:
        if metadata.get(key):
            return [word.strip() for word in metadata[key].split(",") if word.strip()][:_MAX_WORDS]
    folders = _parse(metadata.get("ss_tag_frequency"))  # kohya: {"10_sks dog": {tag: count}}
    words = [re.sub(r"^\d+_", "", folder) for folder in folders]
    return [word for word in words if word][:_MAX_WORDS]


def _parse(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
