"""The adapters of one pipeline: found, read, loaded into slots, applied."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import lora_components
from bentoml_diffusers.adapters.cache import HostCache
from bentoml_diffusers.adapters.files import file_key, local_file, read_tensors
from bentoml_diffusers.adapters.layers import LayerMap
from bentoml_diffusers.adapters.lora import check_choices, supports_lora
from bentoml_diffusers.adapters.pool import SlotPool
from bentoml_diffusers.adapters.reader import convert_lora
from bentoml_diffusers.adapters.records import AdapterReport, AdapterSet, PreparedAdapters
from bentoml_diffusers.adapters.runs import Running, make_run
from bentoml_diffusers.adapters.scales import expand_scales
from bentoml_diffusers.adapters.sources import read_layer_scale
from bentoml_diffusers.adapters.static import attach_static_adapters, request_finder
from bentoml_diffusers.adapters.tokens import (
    PlaceholderToken,
    Tokenizers,
    TokenTable,
    find_encoders,
    read_embedding,
)
from bentoml_diffusers.errors import InvalidRequest, UnsupportedByPipeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.layers import HostLora
    from bentoml_diffusers.adapters.runs import Pairs, TokenRows
    from bentoml_diffusers.adapters.sources import Adapter
    from bentoml_diffusers.adapters.tokens import Encoder, HostEmbedding
    from bentoml_diffusers.options import ModelOptions

logger = logging.getLogger(__name__)

DEFAULT_SLOTS = 8
DEFAULT_MAX_RANK = 128
DEFAULT_CACHE_BYTES = 2**30
DEFAULT_EMBEDDING_SLOTS = 256
EMBEDDING_CACHE_BYTES = 64 * 2**20


class Lease:
    """Adapters of one request, held in slots until :meth:`release`.

    Attributes:
        exclusive: Slots cannot express them (DoRA, LoKr ...): run the request alone, inside
            :meth:`applied`.
        components: Components for the request's own copy of the pipeline.
    """

    def __init__(
        self, bank: AdapterBank, prepared: PreparedAdapters, held: contextlib.ExitStack
    ) -> None:
        self.exclusive = prepared.exclusive
        self.components: Mapping[str, Any] = prepared.tokenizers
        self.prepared = prepared
        self.pairs: Pairs = ()
        self.tokens: dict[str, TokenRows] = {}
        self._bank = bank
        self._held = held

    def release(self) -> None:
        """Releases the slots; idempotent. Only for the holder of the baton."""
        self._held.close()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the adapters for the time of the block; afterwards everything is as before.

        Raises:
            InvalidModel: 400, a file that is not a LoRA for this pipeline.
        """
        with self._bank.applied(self):
            yield


class AdapterBank:
    """The adapters of one pipeline.

    :meth:`find` and :meth:`prepare` are thread-safe and change nothing. The rest is for the thread
    that runs the pipeline. Hooks are attached with the first LoRA of a request, on a compiled
    component at once, so compile first. A forward without LoRAs is bit for bit the plain one,
    with or without hooks.

    Args:
        pipeline: The pipeline; gets the static adapters of the options.
        options: The static adapters, and the limits for those of requests.

    Raises:
        UnsupportedByPipeline: 400, static adapters for a class without them.
        InvalidModel: 400, a static adapter that does not fit this pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline, options: ModelOptions) -> None:
        self._pipeline = pipeline
        self._switch = attach_static_adapters(pipeline, options)
        self._lora_finder = request_finder(options)
        self._inversion_finder = request_finder(options, "textual_inversion")
        self._allow_partial = options.allow_partial_lora is True
        self._check_finite = options.check_finite is not False
        self._embedding_slots = options.embedding_slots or DEFAULT_EMBEDDING_SLOTS
        self._said_exclusive = False
        self._layers = LayerMap(pipeline)
        self._running: dict[int, Running] = {}
        # Guards the modules' structure: PEFT changes it, readers walk over it.
        self._tree = threading.Lock()
        self._max_rank = options.max_lora_rank or DEFAULT_MAX_RANK
        slots = options.lora_slots or DEFAULT_SLOTS
        self._pool = SlotPool(self._layers, slots, self._max_rank, self._runs_on)
        size = options.lora_cache_bytes
        size = DEFAULT_CACHE_BYTES if size is None else size
        self._loras: HostCache[HostLora] = HostCache(size)
        self._embeddings: HostCache[HostEmbedding] = HostCache(min(size, EMBEDDING_CACHE_BYTES))
        self._encoders = find_encoders(pipeline)
        self._tokenizers = Tokenizers(self._encoders)
        self._tables: dict[str, TokenTable] = {}
        for name in lora_components(pipeline):
            if self._layers.is_compiled(name):
                self._pool.attach(name)

    def find(
        self,
        lora_weights: object,
        textual_inversions: object = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> AdapterSet:
        """Finds adapters by name; reads no file. Thread-safe.

        Args:
            lora_weights: A name, a mapping with ``name`` and ``scale``, or a list of either.
            textual_inversions: A name, a mapping with ``name`` and ``token``, or a list of either.
            arguments: Arguments of the pipeline, for ``cross_attention_kwargs={"scale": ...}`` and
                its like, which scale all LoRAs.

        Raises:
            InvalidRequest: 400, malformed, or too many.
            UntrustedSource: 400, outside of the allowed sources.
            AdapterNotFound: 404, no such adapter.
            UnsupportedByPipeline: 400, the pipeline's class takes no such adapters.
        """
        loras = [one for one in self._lora_finder.find_all(lora_weights) if one.scale != 0]
        inversions = self._inversion_finder.find_all(textual_inversions)
        name = type(self._pipeline).__name__
        if loras and not supports_lora(self._pipeline):
            raise UnsupportedByPipeline(name, "LoRA")
        if inversions and not self._encoders:
            raise UnsupportedByPipeline(name, "textual inversion")
        for lora in loras:
            check_choices(self._pipeline, self._lora_finder.field, lora, self._layers.paths)
        if len(loras) > self._pool.slots:
            raise InvalidRequest(
                "lora_weights", len(loras), f"at most {self._pool.slots}, the number of lora_slots"
            )
        layer_scale = read_layer_scale(arguments or {}, can_differ=not self._switch.is_fused)
        return AdapterSet(tuple(loras), tuple(inversions), layer_scale)

    def prepare(self, wanted: AdapterSet) -> PreparedAdapters:
        """Reads and checks the files. Thread-safe; takes milliseconds.

        Raises:
            InvalidModel: 400, a file that is not an adapter of its kind for this pipeline.
            InvalidRequest: 400, a token that exists already.
        """
        read = [self._read_lora(one) for one in wanted.loras]
        loras = tuple(one for one in read if one[0].layers or one[0].beyond_slots)
        tokens = tuple(self._read_token(one) for one in wanted.inversions)
        self._check_room(tokens)
        tokenizers = self._tokenizers.get(tokens) if tokens else {}
        # diffusers scales PEFT's layers in place, those of static LoRAs for all requests.
        rescales = wanted.layer_scale != 1 and self._switch.has_layers
        exclusive = rescales or any(lora.beyond_slots for lora, _ in loras)
        warnings = tuple(
            f"LoRA {lora.name!r} is applied in part: {lora.left_out}"
            for lora, _ in read
            if lora.left_out
        )
        return PreparedAdapters(wanted, loras, tokens, tokenizers, exclusive, warnings)

    def acquire(self, prepared: PreparedAdapters) -> Lease:
        """Loads adapters into slots and holds them there.

        Raises:
            AdaptersBusy: 503, running requests hold all slots.
        """
        with contextlib.ExitStack() as stack:
            lease = Lease(self, prepared, stack)
            if prepared.exclusive:
                self._say_exclusive(prepared)
            else:
                lease.pairs = self._hold_loras(prepared, stack)
            for encoder in self._encoders:
                mine = prepared.embeddings_of(encoder.name)
                if mine:
                    table = self._table(encoder)
                    lease.tokens[encoder.name], keys = table.acquire(mine)
                    stack.callback(table.release, keys)
            lease._held = stack.pop_all()
        return lease

    @contextlib.contextmanager
    def forwarding(
        self, module_name: str, shares: Sequence[tuple[Lease | None, int | None]]
    ) -> Iterator[None]:
        """Declares, for the block, which request each sample in a component's forward belongs to.

        Args:
            module_name: Name of the component.
            shares: Each request's lease (``None``: it has none) and its samples, in the order of
                the batch. ``None`` samples: the only request owns them all.

        Raises:
            ValueError: ``None`` samples beside another share.
        """
        running = self._runs_on(module_name)
        before = running.run
        running.run = make_run(
            [
                (lease.pairs, lease.tokens.get(module_name, ()), count)
                if lease
                else ((), (), count)
                for lease, count in shares
            ],
            running.device,
        )
        try:
            yield
        finally:
            running.run = before

    @contextlib.contextmanager
    def applied(self, lease: Lease) -> Iterator[None]:
        """Applies a lease for the time of the block. See :meth:`Lease.applied`."""
        with contextlib.ExitStack() as stack:
            for name in self._pipeline.components:
                stack.enter_context(self.forwarding(name, [(lease, None)]))
            if lease.exclusive:
                stack.enter_context(self._through_peft(lease))
            yield

    @contextlib.contextmanager
    def _through_peft(self, lease: Lease) -> Iterator[None]:
        """Holds the lock, so that no file is compared with half-changed modules."""
        with contextlib.ExitStack() as stack:
            with self._tree:
                stack.enter_context(self._switch.applied(lease.prepared.wanted.loras))
            try:
                yield
            finally:
                with self._tree:
                    stack.close()

    def report(self) -> AdapterReport:
        """Reports which adapters are known, in memory and in slots. Thread-safe; lists files."""
        caches = (self._loras, self._embeddings)
        return AdapterReport(
            known=tuple(self._lora_finder.known()),
            known_inversions=tuple(self._inversion_finder.known()),
            in_memory=tuple(name for cache in caches for name in cache.names()),
            in_memory_bytes=sum(cache.n_bytes for cache in caches),
            in_slots=tuple(self._pool.residents()),
            slots=self._pool.slots,
            hits=sum(cache.counts.hits for cache in caches) + self._pool.hits,
            misses=sum(cache.counts.misses for cache in caches),
            load_s=sum(cache.counts.load_s for cache in caches),
        )

    def close(self) -> None:
        """Removes every hook; the static adapters stay."""
        self._pool.close()
        for table in self._tables.values():
            table.remove()
        self._tables.clear()
        self._loras.clear()
        self._embeddings.clear()

    def _runs_on(self, module_name: str) -> Running:
        """The components' current runs; two names for one module share one."""
        module = getattr(self._pipeline, module_name, None)
        return self._running.setdefault(id(module), Running(self._layers.device))

    def _hold_loras(self, prepared: PreparedAdapters, stack: contextlib.ExitStack) -> Pairs:
        slots = self._pool.acquire(lora for lora, _ in prepared.loras)
        stack.callback(self._pool.release, slots)
        scales = [scale * prepared.wanted.layer_scale for _, scale in prepared.loras]
        return tuple(zip(slots, scales, strict=True))

    def _table(self, encoder: Encoder) -> TokenTable:
        if encoder.name not in self._tables:
            self._tables[encoder.name] = TokenTable(
                encoder, self._embedding_slots, self._runs_on(encoder.name)
            )
        return self._tables[encoder.name]

    def _read_lora(self, adapter: Adapter) -> tuple[HostLora, float]:
        key, scale = file_key(adapter), adapter.scale
        lora = self._pool.find(key) or self._loras.get(key, lambda: self._load_lora(adapter, key))
        if isinstance(scale, float):
            return lora, scale
        field = f"{self._lora_finder.field}.scale"
        expanded = expand_scales(self._pipeline, field, scale, self._layers.paths)
        return lora.scaled(expanded), 1.0

    def _load_lora(self, adapter: Adapter, key: object) -> HostLora:
        path = local_file(adapter)
        with self._tree:
            raw = convert_lora(
                self._pipeline,
                self._layers,
                adapter.name,
                path,
                adapter.components,
                allow_partial=self._allow_partial,
            )
        fitted = self._layers.fit(
            adapter.name, raw, self._max_rank, check_finite=self._check_finite
        )
        return replace(fitted, key=key)

    def _read_token(self, adapter: Adapter) -> PlaceholderToken:
        key = file_key(adapter)
        embedding = self._embeddings.get(key, lambda: self._load_embedding(adapter, key))
        token = adapter.token or embedding.token
        if token is None:
            raise InvalidRequest(
                "textual_inversions.token",
                None,
                f"a token, since the file of {adapter.name!r} names none",
            )
        return PlaceholderToken(token, embedding)

    def _load_embedding(self, adapter: Adapter, key: object) -> HostEmbedding:
        tensors = read_tensors(adapter.name, local_file(adapter)).tensors
        return replace(
            read_embedding(
                self._pipeline,
                self._encoders,
                adapter.name,
                tensors,
                check_finite=self._check_finite,
            ),
            key=key,
        )

    def _check_room(self, tokens: Sequence[PlaceholderToken]) -> None:
        for encoder in self._encoders:
            wanted = sum(
                len(placeholder.embedding.vectors.get(encoder.name, ())) for placeholder in tokens
            )
            if wanted > self._embedding_slots:
                raise InvalidRequest(
                    "textual_inversions", wanted, f"at most {self._embedding_slots} vectors"
                )

    def _say_exclusive(self, prepared: PreparedAdapters) -> None:
        kinds = sorted({lora.beyond_slots for lora, _ in prepared.loras if lora.beyond_slots})
        if kinds and not self._said_exclusive:
            self._said_exclusive = True
            logger.info("%s runs through PEFT, one request at a time", ", ".join(kinds))
