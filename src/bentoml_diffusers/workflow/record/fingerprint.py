"""One hash that tells the weights of a pipeline from others, without reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.workflow.record.attached import is_adapter_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SAMPLES = 32  # numbers of each weight, evenly spread


def fingerprint_weights(pipeline: Any) -> str:
    """Returns a hash over name, shape, dtype and some numbers of each weight of a pipeline.

    Unfused LoRAs are left out. It finds another model, another dtype, a fused LoRA, an added word;
    it is not proof against a forger. Takes milliseconds.
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
    """Brings tensors of one device to the CPU in one copy."""
    return torch.split(torch.cat(parts).cpu(), [len(part) for part in parts])


def _list_weights(pipeline: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for component, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, weight in module.state_dict().items():
                if not is_adapter_weight(name) and isinstance(weight, torch.Tensor):
                    yield f"{component}.{name.replace('.base_layer', '')}", weight


def _sample(weight: torch.Tensor) -> torch.Tensor | None:
    """Some numbers of a weight; none of one that is not here, or is packed in a way of its own."""
    if weight.is_meta or not weight.numel() or type(weight) is not torch.Tensor:
        return None
    count, last = min(_SAMPLES, weight.numel()), weight.numel() - 1
    places = torch.tensor([index * last // max(count - 1, 1) for index in range(count)])
    places = places.to(weight.device)
    if weight.is_contiguous():
        return weight.detach().reshape(-1)[places]
    # Not by `reshape`, which copies a weight whose channels are last.
    return weight.detach()[torch.unravel_index(places, weight.shape)]
