"""Calls of shared modules, and whose they are."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import signature_of
from bentoml_diffusers.engine.order import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    import torch

    from bentoml_diffusers.adapters import Lease
    from bentoml_diffusers.adapters.runs import Pairs
    from bentoml_diffusers.engine.forwards.joining import Call
    from bentoml_diffusers.engine.forwards.padding import PaddedText
    from bentoml_diffusers.engine.requests import Ticket


@dataclass(eq=False)
class Member:
    """The thread of one running request.

    Attributes:
        ticket: Says when to stop.
        alone: No other request may run beside this one.
        owns_rows: Its attention processors read the rows of a forward: none may be added.
        lease: Adapters of this request.
        batches: How often its forwards were shared by how many requests.
        work: What the order of work knows of the request.
        calls: How often it called each kind with so many rows, and whether for a step.
    """

    ticket: Ticket
    alone: bool = False
    owns_rows: bool = False
    lease: Lease | None = None
    batches: Counter[int] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)
    calls: Counter[tuple[Hashable, int, bool]] = field(default_factory=Counter)
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    task: list[Job] | None = None


@dataclass(frozen=True, eq=False)
class SharedModule:
    """A function of a module whose calls by several requests can be joined.

    Attributes:
        name: Name of the component, with the method if it is not ``forward``.
        run: The real function.
        device: Where it computes.
        denoises: It is called at every step.
        max_rows: Largest batch.
        ignored: Arguments that the function takes but does not use.
        in_buckets: Batches are padded to powers of two: it is compiled for each size.
        has_cache: It returns a cache of keys and values unless it is told not to.
        texts: Arguments that may be padded.
    """

    name: str
    run: Callable[..., Any]
    device: torch.device
    denoises: bool
    max_rows: int
    defaults: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    in_buckets: bool = False
    has_cache: bool = False
    texts: tuple[PaddedText, ...] = ()

    @property
    def component(self) -> str:
        """Name of the component without the method."""
        return self.name.partition(".")[0]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the arguments by name without those that say nothing; ``None``: unclear."""
        names = list(self.defaults)
        if len(args) > len(names):
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        order = [name for name in names if name in given]
        return {
            name: given[name]
            for name in [*order, *(name for name in given if name not in self.defaults)]
            if name not in self.ignored and not _is_default(given[name], self.defaults.get(name))
        }


def parameter_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns each named parameter of a function with its default value, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        item.name: item.default
        for item in signature_of(function).parameters.values()
        if item.kind in kinds
    }


@dataclass(eq=False)
class Job:
    """A call that waits to be run."""

    member: Member
    module: SharedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call | None
    kind: Hashable
    result: Any = None
    error: BaseException | None = None

    @property
    def work(self) -> Work:
        """The work of its request."""
        return self.member.work

    @property
    def is_step(self) -> bool:
        """True if it belongs to a denoising step."""
        return self.module.denoises

    @property
    def max_rows(self) -> int:
        """Largest batch of its module."""
        return self.module.max_rows

    @property
    def key(self) -> Hashable:
        """Jobs of equal key can share a forward."""
        return id(self) if self.call is None else (id(self.module), self.call.key)

    @property
    def rows(self) -> int:
        """Rows of a batch that it fills."""
        return 1 if self.call is None else self.call.samples

    @property
    def pairs(self) -> Pairs:
        """The LoRAs of its request, in slots."""
        return self.member.lease.pairs if self.member.lease else ()


@contextlib.contextmanager
def error_of(job: Job) -> Iterator[None]:
    """Keeps what the block raises as the error of a job."""
    try:
        yield
    except BaseException as err:  # noqa: BLE001 - raised again in the thread of its request
        job.error = err


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)
