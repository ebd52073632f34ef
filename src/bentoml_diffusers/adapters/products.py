"""LoRA's arithmetic: computes what is added to the output of a linear layer or a convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from bentoml_diffusers.adapters.layers import Target


class Held(NamedTuple):
    """A LoRA in a slot, as views ready for multiplication.

    Attributes:
        down: First matrix, shape ``(inputs of the layer, rank)``.
        up: Second matrix, shape ``(rank, outputs of the layer)``.
        factor: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float


def as_rows(
    target: Target, inputs: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a layer's input and output, each as a view with one row per position.

    For a convolution, one row per image.
    """
    if inputs.dtype != target.dtype:
        inputs = inputs.to(target.dtype)
    if target.convolution is not None:
        return inputs, output
    return inputs.reshape(-1, target.inputs), output.view(-1, target.outputs)


def add_product(
    target: Target, inputs: torch.Tensor, output: torch.Tensor, held: Held, scale: float
) -> None:
    """Adds ``scale * factor * up(down(inputs))`` to ``output`` in place.

    Args:
        target: The layer, linear or a convolution.
        inputs: Rows of its input, see :func:`as_rows`.
        output: The same rows of its output.
        held: The LoRA.
        scale: Any number.
    """
    down, up, factor = held
    if target.convolution is not None:
        wide = torch.matmul(up.t(), _convolve(target, inputs, down.t()).flatten(2))
        output.add_(wide.view(output.shape), alpha=scale * factor)
    elif output.dtype == up.dtype:
        # One pass over the output instead of three.
        output.addmm_(inputs.mm(down), up, alpha=scale * factor)
    else:
        output.add_(inputs.mm(down).mm(up), alpha=scale * factor)


def gathered_product(
    target: Target,
    inputs: torch.Tensor,
    output: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Returns ``output`` plus each sample's own product; compiles, as all shapes are fixed.

    Args:
        target: The layer, linear or a convolution.
        inputs: Its input; the first dimension is a multiple of the samples.
        output: Its output.
        down: Shape ``(samples, inputs of the layer, ranks)``; a single sample applies to all.
        up: Shape ``(samples, ranks, outputs of the layer)``.
        scales: Shape ``(samples, ranks)``.
    """
    samples, inputs = len(down), inputs.to(down.dtype)
    if target.convolution is None:
        hidden = torch.bmm(inputs.reshape(samples, -1, inputs.shape[-1]), down)
        wide = torch.bmm(hidden * scales[:, None, :].to(hidden.dtype), up)
        return output + wide.reshape(output.shape).to(output.dtype)
    rows, down = len(inputs), down.transpose(1, 2)
    if samples == 1:
        hidden = _convolve(target, inputs, down[0])
        up, scales = up.expand(rows, -1, -1), scales.expand(rows, -1)
    else:
        times = rows // samples
        down, up, scales = (part.repeat_interleave(times, 0) for part in (down, up, scales))
        joined = inputs.reshape(1, -1, *inputs.shape[2:])
        hidden = _convolve(target, joined, down.flatten(0, 1), groups=rows)
    hidden = hidden.reshape(rows, scales.shape[1], -1) * scales[:, :, None].to(hidden.dtype)
    wide = torch.bmm(up.transpose(1, 2), hidden)
    return output + wide.reshape(output.shape).to(output.dtype)


def _convolve(
    target: Target, inputs: torch.Tensor, weights: torch.Tensor, groups: int = 1
) -> torch.Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[len(target.kernel) - 1]
    kernels = weights.reshape(-1, target.channels, *target.kernel)
    return function(inputs, kernels, None, **dict(target.convolution or {}), groups=groups)
