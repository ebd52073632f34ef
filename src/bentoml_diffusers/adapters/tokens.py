"""Textual inversions of requests: placeholder tokens, and a bounded table of their vectors.

Neither the shared tokenizers nor the shared embeddings change: a request gets its own
tokenizer, whose added tokens have ids beyond the vocabulary, and a hook on the token embedding
replaces those ids by the vectors of that request.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.adapters.files import is_finite
from bentoml_diffusers.errors import (
    AdaptersBusy,
    InvalidModel,
    InvalidRequest,
    UnsupportedByPipeline,
)
from bentoml_diffusers.store import read_embedding_layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.runs import Running, TokenRows

_KEPT_TOKENIZERS = 32


@dataclass(frozen=True)
class HostEmbedding:
    """A validated textual inversion in host memory.

    Attributes:
        name: The name in the request.
        token: The placeholder token that its file names, if any.
        vectors: For each text encoder that it has vectors for, shape ``(vectors, width)``.
        key: Key of the file's content.
    """

    name: str
    token: str | None
    vectors: Mapping[str, torch.Tensor]
    key: object = None

    @property
    def n_bytes(self) -> int:
        """Size of its vectors."""
        return sum(one.numel() * one.element_size() for one in self.vectors.values())


@dataclass(frozen=True)
class PlaceholderToken:
    """A placeholder token of a request, and its embedding."""

    token: str
    embedding: HostEmbedding


class Encoder:
    """A text encoder and the tokenizer that belongs to it."""

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        self.name = name
        self.tokenizer_name = name.replace("text_encoder", "tokenizer")
        self.module = getattr(pipeline, name)
        # No request uses this copy, so any thread may copy it again.
        self.tokenizer = copy.deepcopy(getattr(pipeline, self.tokenizer_name))
        self.first_id = len(self.tokenizer)

    @property
    def width(self) -> int:
        """Returns the length of a vector."""
        return int(self.module.get_input_embeddings().weight.shape[-1])


def find_encoders(pipeline: DiffusionPipeline) -> list[Encoder]:
    """Returns the text encoders that can take textual inversions; empty for other classes."""
    from diffusers.loaders import TextualInversionLoaderMixin

    if not isinstance(pipeline, TextualInversionLoaderMixin):
        return []
    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    return [
        Encoder(pipeline, name)
        for name in names
        if hasattr(getattr(pipeline, name), "get_input_embeddings")
        and getattr(pipeline, name.replace("text_encoder", "tokenizer"), None) is not None
    ]


def read_embedding(
    pipeline: DiffusionPipeline,
    encoders: Sequence[Encoder],
    name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    check_finite: bool,
) -> HostEmbedding:
    """Assigns all vectors of a file to text encoders, or refuses the file.

    Raises:
        UnsupportedByPipeline: 400, the pipeline's class takes no textual inversions.
        InvalidModel: 400, not an embedding for these text encoders.
    """
    kind = type(pipeline).__name__
    if not encoders:
        raise UnsupportedByPipeline(kind, "textual inversion")
    layout = read_embedding_layout(
        name, {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    )
    vectors = {part: _vectors(name, tensors[key]) for part, key in layout.keys.items()}
    found = _assign(name, kind, [encoder.name for encoder in encoders], vectors)
    _check_vectors(name, encoders, found, check_finite=check_finite)
    dtypes = {one.name: one.module.get_input_embeddings().weight.dtype for one in encoders}
    cast = {key: vectors.to(dtypes[key]) for key, vectors in found.items()}
    return HostEmbedding(name, layout.token, cast)


def _assign(
    name: str, kind: str, encoders: Sequence[str], vectors: Mapping[str | None, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the vectors of each text encoder; if there are several, the file must name them.

    An encoder without vectors would read the token as ordinary letters.
    """
    if None in vectors:
        if len(encoders) > 1:
            raise InvalidModel(
                name,
                f"was made for another base model: it has vectors for one text encoder, and "
                f"{kind} encodes a prompt with {' and '.join(encoders)}",
                "name its tensors clip_l and clip_g, or only clip_l for the first encoder alone",
            )
        return {encoders[0]: vectors[None]}
    strange = [part for part in vectors if part not in encoders]
    if strange:
        raise InvalidModel(
            name,
            f"was made for another base model: it has vectors for {' and '.join(map(str, strange))}"
            f", and {kind} encodes a prompt with {' and '.join(encoders)}",
        )
    return {str(part): tensor for part, tensor in vectors.items()}


def _vectors(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        raise InvalidModel(
            name, f"must hold vectors, but has a tensor of shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1, tensor.shape[-1])


def _check_vectors(
    name: str,
    encoders: Sequence[Encoder],
    found: Mapping[str, torch.Tensor],
    *,
    check_finite: bool,
) -> None:
    widths = {encoder.name: encoder.width for encoder in encoders}
    for encoder, vectors in found.items():
        if vectors.shape[1] != widths[encoder]:
            raise InvalidModel(
                name,
                f"was made for another base model: {encoder} takes vectors of length "
                f"{widths[encoder]}, those in the file have {vectors.shape[1]}",
            )
        if check_finite and not is_finite(vectors):
            raise InvalidModel(name, "holds NaN or infinity")


class TokenTable:
    """A table of vectors for one text encoder; evicts the least recently used. Not thread-safe.

    Args:
        encoder: The text encoder.
        size: Number of vectors that fit.
        running: Its current run.
    """

    def __init__(self, encoder: Encoder, size: int, running: Running) -> None:
        import torch

        self.size = size
        self._encoder = encoder
        self._running = running
        embedding = encoder.module.get_input_embeddings()
        weight = embedding.weight
        self._table = torch.zeros(size, encoder.width, dtype=weight.dtype, device=weight.device)
        self._residents: OrderedDict[object, _Placed] = OrderedDict()
        self._free = list(range(size - 1, -1, -1))
        self._asked: torch.Tensor | None = None
        self._handles = [
            embedding.register_forward_pre_hook(self._before),
            embedding.register_forward_hook(self._after),
        ]

    def acquire(self, embeddings: Sequence[HostEmbedding]) -> tuple[TokenRows, list[object]]:
        """Holds the vectors of ``embeddings`` in the table until :meth:`release`.

        Returns:
            Their rows, in order, and what to release.

        Raises:
            AdaptersBusy: 503, running requests hold too many; then none is held for this request.
        """
        rows: list[int] = []
        held: list[object] = []
        try:
            for embedding in embeddings:
                placed = self._residents.get(embedding.key) or self._place(embedding)
                placed.leases += 1
                self._residents.move_to_end(embedding.key)
                held.append(embedding.key)
                rows += placed.rows
        except BaseException:
            self.release(held)
            raise
        return tuple(rows), held

    def release(self, keys: Sequence[object]) -> None:
        """Releases the held vectors."""
        for key in keys:
            self._residents[key].leases -= 1

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _place(self, embedding: HostEmbedding) -> _Placed:
        import torch

        vectors = embedding.vectors[self._encoder.name]
        self._make_room(len(vectors))
        rows = [self._free.pop() for _ in range(len(vectors))]
        try:
            with torch.no_grad():
                self._table[rows] = vectors.to(self._table.device)
        except BaseException:
            self._free += rows
            raise
        placed = _Placed(rows)
        self._residents[embedding.key] = placed
        return placed

    def _make_room(self, wanted: int) -> None:
        while len(self._free) < wanted:
            idle = next((key for key, one in self._residents.items() if not one.leases), None)
            if idle is None:
                raise AdaptersBusy("embedding_slots", self.size, wanted)
            self._free += self._residents.pop(idle).rows

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        """Hides the ids of placeholder tokens from the embedding, which would refuse them."""
        run = self._running.run
        self._asked = None
        if run is None or not any(span.tokens for span in run.spans):
            return None
        self._asked = args[0]
        return (args[0].masked_fill(args[0] >= self._encoder.first_id, 0), *args[1:])

    def _after(
        self, _module: torch.nn.Module, _args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        import torch

        ids, run = self._asked, self._running.run
        self._asked = None
        if ids is None or run is None:
            return None
        table = self._table = self._table.to(output.device)
        result = output.clone()
        for span in run.spans:
            if span.tokens:
                rows = slice(span.start, span.stop) if run.samples else slice(None)
                private = ids[rows] - self._encoder.first_id
                tokens = torch.tensor(span.tokens, device=output.device)
                vectors = table[tokens[private.clamp(0, len(tokens) - 1)]].to(output.dtype)
                result[rows] = torch.where((private >= 0)[..., None], vectors, output[rows])
        return result


@dataclass
class _Placed:
    rows: list[int]
    leases: int = 0


class Tokenizers:
    """Tokenizers that know the placeholder tokens of a request. Thread-safe."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self._encoders = encoders
        self._kept: OrderedDict[object, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tokens: Sequence[PlaceholderToken]) -> dict[str, Any]:
        """Returns tokenizers by component name; the same objects for the same tokens.

        Raises:
            InvalidRequest: 400, a token that the vocabulary has already.
        """
        shape = tuple(
            (
                placeholder.token,
                tuple((name, len(part)) for name, part in placeholder.embedding.vectors.items()),
            )
            for placeholder in tokens
        )
        with self._lock:
            if shape not in self._kept:
                self._kept[shape] = {
                    encoder.tokenizer_name: _with_tokens(encoder, tokens)
                    for encoder in self._encoders
                    if any(encoder.name in placeholder.embedding.vectors for placeholder in tokens)
                }
                if len(self._kept) > _KEPT_TOKENIZERS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(shape)
            return self._kept[shape]


def _with_tokens(encoder: Encoder, tokens: Sequence[PlaceholderToken]) -> Any:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    for placeholder in tokens:
        vectors = placeholder.embedding.vectors.get(encoder.name)
        if vectors is None:
            continue
        # The suffixes under which diffusers' `maybe_convert_prompt` looks for further vectors.
        names = [
            placeholder.token,
            *(f"{placeholder.token}_{index}" for index in range(1, len(vectors))),
        ]
        known = len(tokenizer)
        tokenizer.add_tokens(names)
        expected = list(range(known, known + len(names)))
        if tokenizer.convert_tokens_to_ids(names) != expected:
            raise InvalidRequest(
                "textual_inversions.token",
                placeholder.token,
                "a token that is neither in the vocabulary nor used by another embedding",
            )
    return tokenizer
