"""The adapters of a request, found and prepared, and the report of a bank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.adapters.layers import HostLora
    from bentoml_diffusers.adapters.sources import Adapter
    from bentoml_diffusers.adapters.tokens import HostEmbedding, PlaceholderToken


@dataclass(frozen=True)
class AdapterSet:
    """The adapters that a request asked for, resolved to files.

    Attributes:
        loras: LoRAs, without those of scale 0.
        inversions: Textual inversions.
        layer_scale: Scale of all LoRAs, as in ``cross_attention_kwargs={"scale": 0.5}``.
    """

    loras: tuple[Adapter, ...] = ()
    inversions: tuple[Adapter, ...] = ()
    layer_scale: float = 1.0


@dataclass(frozen=True)
class PreparedAdapters:
    """The adapters of a request, read and validated.

    Attributes:
        wanted: What was asked for.
        loras: Each LoRA with its scale.
        tokens: Each placeholder with its embedding.
        tokenizers: Tokenizers that know the tokens, by name of the component.
        exclusive: Slots cannot express them: the request must run alone.
        warnings: Names what in the files is not applied.
    """

    wanted: AdapterSet
    loras: tuple[tuple[HostLora, float], ...] = ()
    tokens: tuple[PlaceholderToken, ...] = ()
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    warnings: tuple[str, ...] = ()

    def embeddings_of(self, encoder: str) -> list[HostEmbedding]:
        """Returns the embeddings that hold vectors for a text encoder."""
        return [
            placeholder.embedding
            for placeholder in self.tokens
            if encoder in placeholder.embedding.vectors
        ]


@dataclass(frozen=True)
class AdapterReport:
    """The state and statistics of a bank.

    Attributes:
        known: LoRAs that requests can name, by name; files on disk or in the store.
        known_inversions: The same for textual inversions.
        in_memory: Adapters in host memory.
        in_memory_bytes: Their size.
        in_slots: LoRAs in slots, the least recently used first.
        slots: Number of slots.
        hits: Adapters that were found in host memory or a slot.
        misses: Adapters that were read from a file.
        load_s: Total seconds spent reading.
    """

    known: tuple[str, ...]
    known_inversions: tuple[str, ...]
    in_memory: tuple[str, ...]
    in_memory_bytes: int
    in_slots: tuple[str, ...]
    slots: int
    hits: int
    misses: int
    load_s: float
