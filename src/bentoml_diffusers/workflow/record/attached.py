"""Finds adapters on the modules of a pipeline, whoever loaded them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import tuner_layer
from bentoml_diffusers.workflow.files import Attached

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import JsonValue


def find_attached(pipeline: Any) -> list[Attached]:
    """Returns the LoRAs, IP-Adapters and textual inversions on the modules of a pipeline."""
    modules = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return [
        *(one for name, module in modules.items() for one in _find_loras(name, module)),
        *(one for name, module in modules.items() for one in _find_ip_adapters(name, module)),
        *(one for name, module in modules.items() for one in _find_words(pipeline, name, module)),
    ]


def is_adapter_weight(name: str) -> bool:
    """True for a weight that belongs to an adapter of PEFT, by its name in the state dict."""
    return any(part.startswith(("lora_", "hada_", "lokr_")) for part in name.split("."))


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns one sha256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.is_meta:  # offloaded to where it cannot be read
            continue
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _find_loras(component: str, module: torch.nn.Module) -> Iterator[Attached]:
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict):
        return
    layers = _tuner_layers(module)
    for name, config in configs.items():
        mine = {key: layer for key, layer in layers.items() if name in layer.scaling}
        yield Attached(
            kind="lora",
            component=component,
            name=name,
            scale=_common({key: _scale(layer, name) for key, layer in mine.items()}),
            is_active=any(
                name in layer.active_adapters and not layer.disable_adapters
                for layer in mine.values()
            ),
            details=_describe(config, mine, name),
            sha256=hash_tensors(dict(_weights(mine, name))),
        )


def _tuner_layers(module: torch.nn.Module) -> dict[str, Any]:

    return {
        key: part
        for key, part in module.named_modules()
        if isinstance(part, tuner_layer()) and hasattr(part, "scaling")
    }


def _scale(layer: Any, name: str) -> float:
    """The factor on top of alpha / rank."""
    rank, alpha = layer.r[name], getattr(layer, "lora_alpha", {}).get(name)
    scaling = float(layer.scaling[name])
    return round(scaling * rank / alpha if alpha else scaling, 6)


def _common(values: Mapping[str, float]) -> JsonValue:
    """Returns one number if all are the same, else each."""
    different = set(values.values())
    return different.pop() if len(different) == 1 else dict(values)


def _describe(config: Any, layers: Mapping[str, Any], name: str) -> dict[str, JsonValue]:
    return {
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None) or getattr(config, "alpha", None),
        "layers": len(layers),
        "is_fused": any(name in layer.merged_adapters for layer in layers.values()),
    }


def _weights(layers: Mapping[str, Any], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, layer in layers.items():
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute, {})
            if name not in held:
                continue
            part = held[name]
            if isinstance(part, torch.Tensor):
                yield f"{key}.{attribute}", part
            else:
                yield from ((f"{key}.{attribute}.{at}", one) for at, one in part.named_parameters())


def _find_ip_adapters(component: str, module: torch.nn.Module) -> Iterator[Attached]:
    processors = {
        name: one
        for name, one in getattr(module, "attn_processors", {}).items()
        if isinstance(one, torch.nn.Module) and hasattr(one, "scale")
    }
    if not processors:
        return
    projection: Any = getattr(module, "encoder_hid_proj", None)
    tensors = dict(projection.named_parameters(prefix="projection")) if projection else {}
    for name, one in processors.items():
        tensors |= dict(one.named_parameters(prefix=name))
    scales = {name: _plain_scale(one.scale) for name, one in processors.items()}
    texts = {repr(scale) for scale in scales.values()}
    yield Attached(
        kind="ip_adapter",
        component=component,
        name="ip_adapter",
        scale=next(iter(scales.values())) if len(texts) == 1 else dict(scales),
        details={"layers": len(processors)},
        sha256=hash_tensors(tensors),
    )


def _plain_scale(scale: Any) -> JsonValue:
    return [_plain_scale(one) for one in scale] if isinstance(scale, list) else float(scale)


def _find_words(pipeline: Any, component: str, module: Any) -> Iterator[Attached]:
    tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"), None)
    if not component.startswith("text_encoder") or not hasattr(tokenizer, "added_tokens_decoder"):
        return
    words = _added_words(tokenizer)
    weight = _embeddings(module) if words else None
    for index, token in words:
        if weight is not None and index < len(weight):
            yield Attached(
                kind="textual_inversion",
                component=component,
                name=token,
                sha256=hash_tensors({"vector": weight[index]}),
            )


def _embeddings(module: Any) -> torch.Tensor | None:
    try:
        weight = module.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # a text encoder without the usual embedding
        return None
    return weight if isinstance(weight, torch.Tensor) else None


def _added_words(tokenizer: Any) -> list[tuple[int, str]]:
    """Tokens that were added later; those that the vocabulary itself adds are special tokens."""
    return [
        (index, str(token.content))
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if not token.special
    ]
