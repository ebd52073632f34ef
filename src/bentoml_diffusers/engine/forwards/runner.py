"""Runs the calls of shared modules: alone, or joined and split.

By the holder of the baton, except for the counts.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.engine.forwards import joining
from bentoml_diffusers.engine.forwards.calls import error_of
from bentoml_diffusers.engine.forwards.verification import compare_outputs
from bentoml_diffusers.engine.order import bucket

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bentoml_diffusers.adapters import AdapterBank, Lease
    from bentoml_diffusers.engine.forwards.calls import Job, SharedModule
    from bentoml_diffusers.engine.forwards.profile import CostProfile

logger = logging.getLogger(__name__)


class Forwards:
    """The forwards of one pipeline's modules.

    Args:
        bank: The adapters; it is told which rows of a batch belong to whom.
        profile: Measures them.
    """

    def __init__(self, bank: AdapterBank, profile: CostProfile) -> None:
        self._bank = bank
        self._profile = profile
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()
        self._unjoinable: set[Hashable] = set()
        self._verified: set[Hashable] = set()

    @property
    def counts(self) -> Counter[int]:
        """How many forwards were shared by how many requests, until now. From any thread."""
        with self._lock:
            return Counter(self._counts)

    def take_apart(
        self, module: SharedModule, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> joining.Call | None:
        """Returns a call that can be joined with others, or ``None``."""
        if module.name in self._unjoinable:
            return None
        arguments = module.bind(args, kwargs)
        call = joining.take_apart(arguments) if arguments else None
        return None if _mark(module, call) in self._unjoinable else call

    def run(self, jobs: list[Job]) -> None:
        """Runs jobs of equal key; each has a result or an error of its own afterwards."""
        if len(jobs) == 1 and not (jobs[0].call and jobs[0].module.in_buckets):
            with error_of(jobs[0]):
                jobs[0].result = self.run_lone(jobs[0])
            return
        try:
            results = self._run_together(jobs)
        except torch.OutOfMemoryError as err:
            self._after_out_of_memory(jobs, err)
        except Exception as err:  # noqa: BLE001 - each is run again alone, and keeps its own error
            self._after_failure(jobs, err)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.result = result

    def _after_out_of_memory(self, jobs: list[Job], error: Exception) -> None:
        torch.cuda.empty_cache()
        if len(jobs) == 1:
            jobs[0].error = error
            return
        self._profile.shrink(jobs[0].kind, sum(job.rows for job in jobs))
        half = len(jobs) // 2
        self.run(jobs[:half])
        self.run(jobs[half:])

    def _after_failure(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            with error_of(job):
                job.result = self.run_lone(job)
        if all(job.error is None and job.call is not None for job in jobs):
            logger.info("forwards of %s are not shared: %s", jobs[0].module.name, error)
            self._unjoinable.add(_mark(jobs[0].module, jobs[0].call))

    def _verify(self, jobs: list[Job], structure: str, results: list[Any]) -> list[Any]:
        """Returns the lone results if a row of the first shared ones depends on its place."""
        module = jobs[0].module
        lone = [self._run_uncounted(job) for job in jobs]
        verdict = compare_outputs(
            results, lone, lambda index, share: self._run_perturbed(jobs[index], share)
        )
        if verdict.is_same:
            self._verified.add((jobs[0].kind, structure))
            return results
        self._unjoinable.add(module.name)
        logger.warning(
            "forwards of %s are not shared: its rows depend on each other (one differs by %.2g of "
            "itself, rounding explains %.2g)",
            *(module.name, verdict.gap, verdict.rounding),
        )
        return lone

    def _run_uncounted(self, job: Job) -> Any:
        if job.call is not None and job.module.in_buckets:
            return self._run_call(job, job.call)
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            return job.module.run(*job.args, **job.kwargs)

    def _run_perturbed(self, job: Job, share: float) -> Any:
        assert job.call is not None  # noqa: S101 - it was joined
        return self._run_call(job, joining.perturb(job.call, share))

    def _run_call(self, job: Job, call: joining.Call) -> Any:
        rows = bucket(call.samples) if job.module.in_buckets else call.samples
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            output = job.module.run(**joining.join([call], rows))
        return joining.split(output, [call.samples], rows)[0]

    def _run_together(self, jobs: list[Job]) -> list[Any]:
        module = jobs[0].module
        calls = [job.call for job in jobs if job.call is not None]
        counts = [call.samples for call in calls]
        rows = bucket(sum(counts)) if module.in_buckets else sum(counts)
        shares: list[tuple[Lease | None, int | None]] = [
            (job.member.lease, count) for job, count in zip(jobs, counts, strict=True)
        ]
        if rows > sum(counts):
            shares.append((None, rows - sum(counts)))
        arguments = joining.join(calls, rows)
        stop = self._profile.start(module.device, jobs[0].kind, rows)
        with self._bank.forwarding(module.component, shares):
            output = module.run(**arguments)
        stop()
        parts = joining.split(output, counts, rows)
        if len(jobs) > 1 and (jobs[0].kind, calls[0].structure) not in self._verified:
            parts = self._verify(jobs, calls[0].structure, parts)
        self._count(jobs)
        return parts

    def run_lone(self, job: Job) -> Any:
        """Runs a call with its own arguments, and returns what it returns."""
        rows = job.args[0].shape[0] if job.args and hasattr(job.args[0], "shape") else 1
        stop = self._profile.start(job.module.device, job.kind, rows)
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            result = job.module.run(*job.args, **job.kwargs)
        stop()
        self._count([job])
        return result

    def _count(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._counts[len(jobs)] += 1
        for job in jobs:
            job.member.batches[len(jobs)] += 1


def _mark(module: SharedModule, call: joining.Call | None) -> Hashable:
    return module.name, None if call is None else call.key
