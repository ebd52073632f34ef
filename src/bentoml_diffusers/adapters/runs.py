"""Which request owns which samples of a joint forward; the hooks of a component read this."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_FEW = 4  # this many separate products need no more kernels than one batched product

# Slots of LoRAs, each with the scale that the request asked for.
Pairs = tuple[tuple[int, float], ...]
# Rows in the embedding table of a request's placeholder tokens, in the order of their ids.
TokenRows = tuple[int, ...]


class Span(NamedTuple):
    """Samples ``start`` up to ``stop`` of a joint batch, with the adapters of their request."""

    start: int
    stop: int
    pairs: Pairs = ()
    tokens: TokenRows = ()


@dataclass(frozen=True)
class Run:
    """The owners of one forward.

    Attributes:
        spans: In order, without gaps. A single one owns all samples.
        samples: Samples in the batch; 0 for a single owner of any number.
        index: Slots of each sample, shape ``(samples, LoRAs)``, padded with the empty slot 0;
            one row for a single owner.
        scales: Their scales, of the same shape.
        gains_by_gathering: One batched product is faster than one for each LoRA.
    """

    spans: tuple[Span, ...]
    samples: int
    index: torch.Tensor
    scales: torch.Tensor
    gains_by_gathering: bool = False


@dataclass
class Running:
    """What runs on one component at the moment.

    Attributes:
        device: Where the component runs.
        run: The owners of the samples; ``None`` if no request brought adapters.
    """

    device: torch.device | None = None
    run: Run | None = None


def make_run(
    shares: Sequence[tuple[Pairs, TokenRows, int | None]], device: torch.device | None = None
) -> Run | None:
    """Joins the shares of a forward into a run.

    Args:
        shares: For each request its LoRA slots, its tokens and its samples, in the order of the
            batch; ``None`` samples: all, if it is the only one.
        device: Where the slots are.

    Raises:
        ValueError: ``None`` samples beside another share.
    """
    owners = {(pairs, tokens) for pairs, tokens, count in shares if count != 0}
    if owners <= {((), ())}:
        return None
    if len(owners) == 1:
        ((pairs, tokens),) = owners
        return _alone(pairs, tokens, device)
    return _shared(tuple(shares), device)


@functools.lru_cache(maxsize=256)
def _alone(pairs: Pairs, tokens: TokenRows, device: torch.device | None) -> Run:
    return _with_tensors((Span(0, 0, pairs, tokens),), 0, device)


@functools.lru_cache(maxsize=256)
def _shared(
    shares: tuple[tuple[Pairs, TokenRows, int | None], ...], device: torch.device | None
) -> Run:
    spans: list[Span] = []
    start = 0
    for pairs, tokens, count in shares:
        if count is None:
            raise ValueError("a share without a number of samples must be the only one")
        if spans and spans[-1][2:] == (pairs, tokens):
            spans[-1] = spans[-1]._replace(stop=start + count)
        else:
            spans.append(Span(start, start + count, pairs, tokens))
        start += count
    return _with_tensors(tuple(spans), start, device)


def _with_tensors(spans: tuple[Span, ...], samples: int, device: torch.device | None) -> Run:
    """Adds, for each sample, its slots and scales, padded with the empty slot 0."""
    import torch

    # Few widths, so that a compiled forward sees few shapes.
    widest = max(len(span.pairs) for span in spans)
    width = 1 << max(widest - 1, 0).bit_length()
    index, scales = [], []
    for span in spans:
        padded = span.pairs + ((0, 0.0),) * (width - len(span.pairs))
        for _ in range(max(span.stop - span.start, 1)):
            index.append([slot for slot, _ in padded])
            scales.append([scale for _, scale in padded])
    slots = torch.tensor(index, dtype=torch.long, device=device)
    # A CPU spends its time on the numbers, other devices on the number of kernels.
    products = sum(len(span.pairs) for span in spans)
    return Run(
        spans,
        samples,
        slots,
        torch.tensor(scales, dtype=torch.float32, device=device),
        gains_by_gathering=bool(samples) and products > _FEW and slots.device.type != "cpu",
    )
