"""Tracks which LoRA is in which slot, and evicts the least recently used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bentoml_diffusers._compat import copy_tensors
from bentoml_diffusers.adapters.files import list_outdated
from bentoml_diffusers.adapters.slots import SlotLayer
from bentoml_diffusers.errors import AdaptersBusy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from bentoml_diffusers.adapters.layers import HostLora, LayerKey, LayerMap
    from bentoml_diffusers.adapters.runs import Running


@dataclass
class _Resident:
    lora: HostLora
    slot: int
    leases: int = 0


class SlotPool:
    """The slots of all layers of a pipeline. For the holder of the baton, unless noted otherwise.

    Args:
        layers: The layers of the pipeline.
        slots: Number of LoRAs that can be resident at once.
        max_rank: Largest rank of a LoRA.
        running: Returns the current run of a component, by its name.
    """

    def __init__(
        self, layers: LayerMap, slots: int, max_rank: int, running: Callable[[str], Running]
    ) -> None:
        self.slots = slots
        self.hits = 0
        self._map = layers
        self._max_rank = max_rank
        self._compiled: set[str] = set()
        self._running = running
        self._layers: dict[LayerKey, SlotLayer] = {}
        self._residents: OrderedDict[object, _Resident] = OrderedDict()
        # Guards the residents: for writing them, and for reading without the baton.
        self._lock = threading.Lock()
        self._free = list(range(slots, 0, -1))

    def acquire(self, loras: Iterable[HostLora]) -> list[int]:
        """Loads LoRAs into slots and holds them there until :meth:`release`.

        Returns:
            The slot of each.

        Raises:
            AdaptersBusy: 503, every slot is held; then none is held for this request.
        """
        held: list[int] = []
        try:
            for lora in loras:
                resident = self._residents.get(lora.key) or self._load(lora)
                resident.leases += 1
                with self._lock:
                    self._residents.move_to_end(lora.key)
                held.append(resident.slot)
        except BaseException:
            # The caller learns of no slot, so it could never release these.
            self.release(held)
            raise
        return held

    def release(self, slots: Iterable[int]) -> None:
        """Releases slots; their LoRAs stay until they are evicted."""
        by_slot = {resident.slot: resident for resident in self._residents.values()}
        for slot in slots:
            if slot in by_slot:  # missing if the pool was closed meanwhile
                by_slot[slot].leases -= 1

    def attach(self, component: str) -> None:
        """Attaches the hooks of a whole component before any slot is filled.

        For a compiled component: it ignores hooks attached after its first run, and each growth
        of a slot would recompile it, so its slots get their largest size at once.
        """
        self._compiled.add(component)
        for key in self._map.keys(component):
            self._layer(key)

    def find(self, key: object) -> HostLora | None:
        """Returns a LoRA that is in a slot. Thread-safe."""
        with self._lock:
            resident = self._residents.get(key)
            if resident is None:
                return None
            self.hits += 1
            return resident.lora

    def residents(self) -> list[str]:
        """Returns the names of the LoRAs in slots. Thread-safe.

        A file that is replaced while a request runs with it occupies two slots.
        """
        with self._lock:
            names = [resident.lora.name for resident in self._residents.values()]
        return list(dict.fromkeys(names))

    def close(self) -> None:
        """Removes every hook and buffer."""
        for layer in self._layers.values():
            layer.remove()
        self._layers.clear()
        with self._lock:
            self._residents.clear()
        self._free = list(range(self.slots, 0, -1))

    def _load(self, lora: HostLora) -> _Resident:
        import torch

        # A file that was replaced is never asked for again: its slot goes first.
        for old in list_outdated(self._residents, lora.key):
            if not self._residents[old].leases:
                self._free.append(self._evict(old))
        slot = self._take_slot()
        try:
            # Buffers made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._fill(slot, lora)
        except BaseException:
            # A half-copied LoRA must not stay: gathering forwards read empty slots as zeros.
            self._clear(slot, lora)
            self._free.append(slot)
            raise
        resident = _Resident(lora, slot)
        with self._lock:
            self._residents[lora.key] = resident
        return resident

    def _fill(self, slot: int, lora: HostLora) -> None:
        sources: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for key, (down, up, factor) in lora.layers.items():
            layer, rank = self._layer(key), down.shape[0]
            layer.reserve(
                self._max_rank if key[0] in self._compiled else rank, down, self._map.device
            )
            sources += [down, up]
            places += layer.place(slot, rank, factor)
        copy_tensors(places, sources)

    def _clear(self, slot: int, lora: HostLora) -> None:
        for key in lora.layers:
            if key in self._layers:
                self._layers[key].clear(slot)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for key, resident in self._residents.items():
            if not resident.leases:
                return self._evict(key)
        raise AdaptersBusy("lora_slots", self.slots, 1)

    def _evict(self, key: object) -> int:
        with self._lock:
            resident = self._residents.pop(key)
        self._clear(resident.slot, resident.lora)
        return resident.slot

    def _layer(self, key: LayerKey) -> SlotLayer:
        if key not in self._layers:
            self._layers[key] = SlotLayer(
                self._map.servable(key),
                self.slots,
                self._running(key[0]),
                gathers=key[0] in self._compiled or self._map.device.type != "cpu",
            )
        return self._layers[key]
