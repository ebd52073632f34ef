"""A fingerprint of a pipeline's weights, without reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.workflow.record.attached import is_adapter_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SAMPLES = 32  # numbers of each weight, evenly spaced


def fingerprint_weights(pipeline: Any) -> str:
    """Returns a hash over name, shape, dtype and some numbers of each weight of a pipeline.

    Unfused LoRAs are left out. It changes with another model, another dtype, a fused LoRA or an
    added token; it is no protection against forgery. Takes milliseconds.
    """
    digest = hashlib.sha256()
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    order: list[tuple[torch.device, torch.dtype]] = []
    with torch.no_grad():
        for name, weight in _list_weights(pipeline):
            digest.update(f"{name}\0{weight.dtype}\0{list(weight.shape)}\n".encode())
            part = _sample(weight)
            if part is not None:
                order.append((part.device, part.dtype))
                samples.setdefault(order[-1], []).append(part)
        fetched = {key: iter(_fetch(parts)) for key, parts in samples.items()}
        for key in order:
            digest.update(next(fetched[key]).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fetch(parts: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Copies tensors of one device to the CPU, all in one copy."""
    return torch.split(torch.cat(parts).cpu(), [len(part) for part in parts])


def _list_weights(pipeline: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for component, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, weight in module.state_dict().items():
                if not is_adapter_weight(name) and isinstance(weight, torch.Tensor):
                    yield f"{component}.{name.replace('.base_layer', '')}", weight


def _sample(weight: torch.Tensor) -> torch.Tensor | None:
    """Some numbers of a weight; none if it is not in memory, or packed in its own format."""
    if weight.is_meta or not weight.numel() or type(weight) is not torch.Tensor:
        return None
    count, last = min(_SAMPLES, weight.numel()), weight.numel() - 1
    places = torch.tensor([index * last // max(count - 1, 1) for index in range(count)])
    places = places.to(weight.device)
    if weight.is_contiguous():
        return weight.detach().reshape(-1)[places]
    # Not by `reshape`, which copies a weight in channels-last format.
    return weight.detach()[torch.unravel_index(places, weight.shape)]
