"""Noise that a pipeline draws without a generator."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def seed_encoder(module: Any, seed: int) -> None:
    """Lets what an autoencoder encodes be drawn by the seed of a request.

    Some pipelines, such as SD3 with a ControlNet, draw it with PyTorch's global generator: no seed
    would make the image again. A generator that a pipeline gives stays.

    Args:
        module: Of one request.
        seed: Of its first image.
    """
    encode = getattr(module, "encode", None)
    if encode is None:
        return

    @functools.wraps(encode)
    def seeded_encode(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        encoded: Any = (
            output[0] if isinstance(output, tuple) else getattr(output, "latent_dist", None)
        )
        if hasattr(encoded, "sample"):
            encoded.sample = _seeded(encoded.sample, seed)
        return output

    vars(module)["encode"] = seeded_encode


def _seeded(sample: Callable[..., Any], seed: int) -> Callable[..., Any]:
    @functools.wraps(sample)
    def seeded_sample(generator: torch.Generator | None = None) -> Any:
        return sample(torch.Generator().manual_seed(seed) if generator is None else generator)

    return seeded_sample
