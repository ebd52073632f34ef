"""Slots: stacked LoRA matrices beside a layer, and the hook that adds those of each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_compiling

from bentoml_diffusers.adapters.products import Held, add_product, as_rows, gathered_product

if TYPE_CHECKING:
    from bentoml_diffusers.adapters.layers import Target
    from bentoml_diffusers.adapters.runs import Run, Running, Span

_RANK_STEPS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Views(NamedTuple):
    """One slot in the layout for multiplying, and transposed, in the layout of files."""

    down: torch.Tensor
    up: torch.Tensor
    file_down: torch.Tensor
    file_up: torch.Tensor

    def narrow(self, rank: int) -> _Views:
        """Returns the part that a LoRA of lower rank occupies."""
        down, up = self.down.narrow(1, 0, rank), self.up.narrow(0, 0, rank)
        return _Views(down, up, down.t(), up.t())


class SlotLayer:
    """The slots of one layer. Slot 0 is empty: it is used for samples without LoRA.

    Only a hook is attached to the base layer: its weights are neither read nor written.

    Args:
        target: The layer.
        slots: Number of slots, not counting the empty one.
        running: The current run of its component.
        gathers: Forwards may gather slots by their number, so empty ones must hold zeros.

    Attributes:
        rank: Rank that fits into each slot; grows in steps.
        down: First matrices, shape ``(slots + 1, inputs, rank)``. Transposed, unlike in
            files: small products take half the time.
        up: Second matrices, shape ``(slots + 1, rank, outputs)``.
        factors: alpha / rank of each slot, shape ``(slots + 1,)``.
    """

    down: torch.Tensor
    up: torch.Tensor
    factors: torch.Tensor

    def __init__(
        self, target: Target, slots: int, running: Running, *, gathers: bool = True
    ) -> None:
        self.target = target
        self._gathers = gathers
        self.rank = 0
        self._slots = slots
        self._running = running
        self._held: dict[int, Held] = {}
        self._views: list[_Views] = []
        self._factors = [0.0] * (slots + 1)
        self._planned: Run | None = None
        self._products: list[tuple[Span, Held, float]] = []
        self._handle = target.module.register_forward_hook(self._add, with_kwargs=True)

    def reserve(self, rank: int, like: torch.Tensor, device: torch.device) -> None:
        """Grows the slots to ``rank``, in the dtype of ``like``; their content is kept."""
        if rank <= self.rank:
            return
        size = next((step for step in _RANK_STEPS if step >= rank), rank)
        slots, target = self._slots + 1, self.target
        down = torch.zeros(slots, target.inputs, size, dtype=like.dtype, device=device)
        up = torch.zeros(slots, size, target.outputs, dtype=like.dtype, device=device)
        if self.rank:
            down[:, :, : self.rank] = self.down
            up[:, : self.rank] = self.up
        else:
            self.factors = torch.zeros(self._slots + 1, device=device)
        self.rank = size
        self._put(down, up)

    def place(self, slot: int, rank: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Assigns a free slot of sufficient rank to a LoRA; returns the views to copy it to."""
        views = self._hold(slot, rank, factor)
        if self._factors[slot] != factor:
            self._factors[slot] = self.factors[slot] = factor
        return views.file_down, views.file_up

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        held = self._held.pop(slot, None)
        self._forget_plan()
        if held is not None and self._gathers:
            held[0].zero_()
            held[1].zero_()

    def remove(self) -> None:
        """Removes the hook."""
        self._handle.remove()

    def _put(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Replaces the buffers by others with the same content."""
        self.down, self.up, self._device = down, up, down.device
        self._forget_plan()
        # For all slots at once: making the views of one takes as long as copying its weights.
        sides = (down, up, down.transpose(1, 2), up.transpose(1, 2))
        self._views = [_Views(*one) for one in zip(*map(torch.unbind, sides), strict=True)]
        for slot, held in self._held.items():
            self._hold(slot, held.down.shape[1], held.factor)

    def _hold(self, slot: int, rank: int, factor: float) -> _Views:
        views = self._views[slot]
        if rank < self.rank:
            views = views.narrow(rank)
        self._held[slot] = Held(views.down, views.up, factor)
        self._forget_plan()
        return views

    def _add(
        self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        run = self._running.run
        if run is None or not self.rank:
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        if inputs.device != self._device:
            self._move(inputs.device)
        # This branch first: torch.compile would specialise on every value that is read before it.
        if is_compiling():
            return self._add_gathered(inputs, output, run)
        if run is not self._planned:
            self._plan(run)
        if not self._products:
            return output
        if run.gains_by_gathering:
            return self._add_gathered(inputs, output, run)
        return self._add_products(inputs, output, run)

    def _plan(self, run: Run) -> None:
        """Plans how to add the LoRAs of a run; the plan is the same at each step.

        After a large product of the base layer Python's code has left the CPU's caches: ten lines
        less save a tenth of a LoRA's cost.
        """
        held = self._held
        self._products = [
            (span, held[slot], scale)
            for span in run.spans
            for slot, scale in span.pairs
            if slot in held
        ]
        self._planned = run

    def _forget_plan(self) -> None:
        """Also drops its references to the buffers."""
        self._planned, self._products = None, []

    def _add_products(self, inputs: torch.Tensor, output: torch.Tensor, run: Run) -> torch.Tensor:
        """One product for each request and LoRA: no gather, and no work for rows without LoRA."""
        target = self.target
        output = output.contiguous() if target.convolution is None else output
        rows_in, rows_out = as_rows(target, inputs, output)
        if not run.samples:
            for _, lora, scale in self._products:
                add_product(target, rows_in, rows_out, lora, scale)
            return output
        self._check_samples(inputs, run)
        times = len(rows_in) // run.samples
        for span, lora, scale in self._products:
            rows = slice(span.start * times, span.stop * times)
            add_product(target, rows_in[rows], rows_out[rows], lora, scale)
        return output

    def _add_gathered(self, inputs: torch.Tensor, output: torch.Tensor, run: Run) -> torch.Tensor:
        """One batched product for all requests, with their LoRAs concatenated along the rank."""
        index = run.index
        if run.samples:
            self._check_samples(inputs, run)
        samples = len(index)
        weights = (run.scales * self.factors[index]).repeat_interleave(self.rank, dim=1)
        down = self.down[index].movedim(1, 2).reshape(samples, self.target.inputs, -1)
        up = self.up[index].reshape(samples, -1, self.target.outputs)
        return gathered_product(self.target, inputs, output, down, up, weights)

    def _check_samples(self, inputs: torch.Tensor, run: Run) -> None:
        """Checks that all samples have the same number of rows: one, or frames, or windows."""
        if len(inputs) % run.samples or not len(inputs):
            raise RuntimeError(
                f"a layer with {len(inputs)} rows cannot be shared by {run.samples} samples "
                "of several requests"
            )

    def _move(self, device: torch.device) -> None:
        """Moves the buffers to the layer's device, which offloading changes."""
        for slot in set(range(self._slots + 1)) - set(self._held):
            self.down[slot].zero_()
            self.up[slot].zero_()
        self._gathers = True
        self.factors = self.factors.to(device)
        self._put(self.down.to(device), self.up.to(device))
