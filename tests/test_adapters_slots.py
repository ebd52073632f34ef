"""How the rows of a joint forward meet their LoRAs on a device that is not the CPU."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bentoml_diffusers.adapters.layers import _target
from bentoml_diffusers.adapters.runs import Running, make_run
from bentoml_diffusers.adapters.slots import SlotLayer

DEVICE = torch.device("meta")
LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 8), (5, 12)),
    "convolution": (lambda: torch.nn.Conv2d(4, 8, 3, padding=1), (4, 6, 6)),
}


class Count(TorchDispatchMode):
    """Counts the operations on tensors."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("loras", "at_once"), [(1, False), (4, False), (5, True), (8, True)])
@pytest.mark.parametrize("layer", LAYERS)
def test_few_loras_are_multiplied_with_one_by_one(layer, loras, at_once):
    """One by one they copy no weights; all at once the number of kernels stays the same."""
    make, shape = LAYERS[layer]
    module, running = make().to(DEVICE), Running(DEVICE)
    slots = SlotLayer(_target(module, SimpleNamespace(dtype=torch.float32)), 8, running)
    down = torch.empty(4, slots.target.inputs, device=DEVICE)
    slots.reserve(4, down, DEVICE)
    for slot in range(1, loras + 1):
        slots.place(slot, 4, 1.0)
    shares = [(((slot, 0.5),), (), 2) for slot in range(1, loras + 1)]
    running.run = make_run([*shares, ((), (), 1)], DEVICE)
    with torch.no_grad(), Count() as count:
        output = module(torch.empty(2 * loras + 1, *shape, device=DEVICE))
    assert len(output) == 2 * loras + 1
    assert count.operations["index"] == (3 if at_once else 0)  # down, up and factor of each sample
