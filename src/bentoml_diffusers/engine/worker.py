"""Runs requests, each in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bentoml_diffusers.engine.flags import read_flags, warn_of_flags
from bentoml_diffusers.engine.forwards import Conductor, Member
from bentoml_diffusers.engine.order import Pace, Paces
from bentoml_diffusers.engine.requests import (
    Result,
    Ticket,
    blame_tensors,
    invalid_request_from,
    run_parts,
    split_request,
    warn_of_prompts,
)
from bentoml_diffusers.engine.views import Views, exclusive_reason
from bentoml_diffusers.errors import (
    AdaptersBusy,
    DeviceOutOfMemory,
    DiffusersError,
    PipelineFailed,
)
from bentoml_diffusers.loading import running_pipeline
from bentoml_diffusers.tasks import read_layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters import AdapterBank, Lease, PreparedAdapters
    from bentoml_diffusers.engine.admission import Entry
    from bentoml_diffusers.engine.requests import Request
    from bentoml_diffusers.options import EngineLimits

logger = logging.getLogger(__name__)

_POLL_S = 0.1
T = TypeVar("T")


class Worker:
    """Runs requests on views of one pipeline.

    Args:
        pipeline: The pipeline.
        bank: Its adapters.
        limits: Bounds of the batches.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, bank: AdapterBank, limits: EngineLimits
    ) -> None:
        exclusivity = exclusive_reason(pipeline)
        if exclusivity is not None:
            logger.info("requests run one at a time: %s", exclusivity.reason)
        self._bank = bank
        self.places = limits.max_running
        self._is_exclusive = exclusivity is not None
        self._shares_modules = exclusivity is None or exclusivity.calls_can_be_collected
        self._views = Views(pipeline, limits, shares_modules=self._shares_modules)
        self._releases = _Releases()
        self.paces = Paces()
        self.conductor = Conductor(bank, limits.max_batch_rows, self._views.modules)

    def run(self, entry: Entry) -> Result:
        """Runs one request in the calling thread.

        Raises:
            DiffusersError: Whatever became of it.
        """
        parts = split_request(entry.request)
        if len(parts) > 1:
            return run_parts(parts, entry.ticket, self._run_one, self.places)
        return self._run_one(entry.request, entry.ticket)

    def _run_one(self, request: Request, ticket: Ticket) -> Result:
        started = time.monotonic()
        ticket.check()
        # Reads files: before the baton is held, so that others run meanwhile.
        prepared = self._bank.prepare(request.adapters)
        alone = request.exclusive or self._is_exclusive or prepared.exclusive
        work = request.work(ticket, self.paces.get(request.signature))
        member = Member(ticket, alone, work=work)
        while True:
            # Noted first: a release between the attempt and the wait would be missed otherwise.
            seen = self._releases.count
            with self.conductor.turn(member):
                ticket.check()
                lease = self._acquire(prepared)
                if lease is not None:
                    return self._run_leased(request, member, lease, started)
            self._releases.wait(seen, ticket)

    def in_turn(self, function: Callable[[], T]) -> T:
        """Returns what a function returns that looks at the pipeline while nobody changes it."""
        with self.conductor.turn(Member(Ticket())):
            return function()

    def _acquire(self, prepared: PreparedAdapters) -> Lease | None:
        """Returns the adapters' lease; ``None`` if others hold the slots that it needs."""
        try:
            lease = self._bank.acquire(prepared)
        except AdaptersBusy:
            # Nobody holds slots, so waiting would never end.
            if not self._releases.held:
                raise
            return None
        self._releases.held += 1
        return lease

    def _release(self, lease: Lease) -> None:
        lease.release()
        self._releases.release()

    def _run_leased(self, request: Request, member: Member, lease: Lease, started: float) -> Result:
        member.lease = lease
        try:
            view = self._views.make(request, member, self.conductor, lease.components)
            warnings = warn_of_prompts(view, request.arguments, request.max_sequence_length)
            # What slots cannot hold, or modules called directly, needs adapters all the time.
            is_whole = lease.exclusive or not self._shares_modules
            with lease.applied() if is_whole else contextlib.nullcontext():
                returned = self._call(view, request, member.ticket)
        finally:
            self._release(lease)
        self.paces.note(request.signature, Pace.of(member.calls, member.ticket.steps_done))
        ticket, flags = member.ticket, read_flags(view, returned)
        if request.canvas is not None:
            returned = request.canvas.restore(returned)
        task = request.task
        arguments = task.with_defaults(request.arguments)
        return Result(
            output=_to_tuple(returned),
            layout=read_layout(view, task.output, returned, arguments),
            seeds=tuple(request.seeds),
            scheduler=type(view.scheduler).__name__ if hasattr(view, "scheduler") else "",
            steps=ticket.steps_done,
            adapters=tuple(
                one.name for one in (*request.adapters.loras, *request.adapters.inversions)
            ),
            batches=dict(member.batches),
            queue_s=started - ticket.submitted,
            run_s=time.monotonic() - started,
            nsfw_content_detected=flags,
            warnings=(*warn_of_flags(flags), *warnings, *lease.prepared.warnings),
        )

    def _call(self, view: DiffusionPipeline, request: Request, ticket: Ticket) -> Any:
        import torch

        name = request.pipeline_class.__name__
        arguments = dict(request.arguments)
        if request.seeds:
            # CPU generators give the same noise on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
            arguments["generator"] = generators if len(generators) > 1 else generators[0]
        token = running_pipeline.set(view)
        try:
            return getattr(view, request.method)(**arguments)
        except DiffusersError:
            raise
        except torch.OutOfMemoryError as err:
            raise DeviceOutOfMemory(name) from err
        except Exception as err:
            invalid = invalid_request_from(err, has_denoised=ticket.steps_done > 0)
            if invalid is None and ticket.steps_done <= 1:  # a mask is put on after the first one
                invalid = blame_tensors(err, request.arguments)
            if invalid is not None:
                raise invalid from err
            logger.exception("%s failed", name)
            raise PipelineFailed(name, err) from err
        finally:
            running_pipeline.reset(token)


@dataclass
class _Releases:
    """Wakes requests that wait for adapter slots."""

    held: int = 0
    count: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def release(self) -> None:
        with self.changed:
            self.held -= 1
            self.count += 1
            self.changed.notify_all()

    def wait(self, seen: int, ticket: Ticket) -> None:
        with self.changed:
            while self.count == seen:
                ticket.check()
                self.changed.wait(_POLL_S)


def _to_tuple(output: Any) -> tuple[Any, ...]:
    import torch

    from bentoml_diffusers._compat import tree_map_only

    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    values = values if isinstance(values, tuple) else (values,)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), values)  # type: ignore[no-any-return]
