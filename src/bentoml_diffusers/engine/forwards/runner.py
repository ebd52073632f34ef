"""Runs the calls of shared modules: alone, or joined and split.

By the holder of the baton, except for the counts.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers.engine.forwards.calls import error_of
from bentoml_diffusers.engine.forwards.joining import Call, join, perturb, take_apart
from bentoml_diffusers.engine.forwards.splitting import NotSplittable, split
from bentoml_diffusers.engine.forwards.verification import compare_outputs
from bentoml_diffusers.engine.order import bucket

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from bentoml_diffusers.adapters import AdapterBank, Lease
    from bentoml_diffusers.adapters.runs import Pairs
    from bentoml_diffusers.engine.forwards.calls import Job, SharedModule
    from bentoml_diffusers.engine.forwards.profile import CostProfile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Mark:
    """What one shared forward proves: others of the same kind may be shared as well."""

    kind: Hashable
    is_mixed: bool
    is_padded: bool


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
        self._strict: set[str] = set()
        self._verified: set[_Mark] = set()

    @property
    def counts(self) -> Counter[int]:
        """How many forwards were shared by how many requests, until now. From any thread."""
        with self._lock:
            return Counter(self._counts)

    def take_apart(
        self, module: SharedModule, args: Sequence[Any], kwargs: Mapping[str, Any], pairs: Pairs
    ) -> Call | None:
        """Returns a call that can be joined with others, or ``None``.

        Args:
            module: What is called.
            args: Of the call.
            kwargs: Of the call.
            pairs: LoRAs of its request.
        """
        if module.name in self._unjoinable:
            return None
        arguments = module.bind(args, kwargs)
        if not arguments:
            return None
        if module.has_cache and not {"use_cache", "past_key_values"} & arguments.keys():
            arguments["use_cache"] = False  # what nobody reads, and cannot be split
        call = take_apart(arguments, module.texts)
        if call is None:
            return None
        if call.in_lists or module.name in self._strict:
            # Layers between lists and rows see no row for each sample: one set of LoRAs for all.
            lengths = call.lengths if module.name in self._strict else ()
            call = replace(call, key=(call.key, pairs, lengths))
        return None if self._unjoinable & set(_marks(module, call)) else call

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
        # Cached blocks of other sizes may hold what was missing.
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
        # Each runs alone: so joining them was what failed, and must not be tried again.
        if all(job.error is None for job in jobs) and jobs[0].call is not None:
            logger.info("forwards of %s are not shared: %s", jobs[0].module.name, error)
            mark, kind = _marks(jobs[0].module, jobs[0].call)
            # What comes out of a module is of one kind, whatever the shapes are.
            self._unjoinable.add(kind if isinstance(error, NotSplittable) else mark)

    def _verify(self, jobs: list[Job], mark: _Mark, results: list[Any]) -> list[Any]:
        """Returns the lone results if a row of the first shared ones depends on its place."""
        module = jobs[0].module
        lone = [self._run_uncounted(job) for job in jobs]
        verdict = compare_outputs(
            results, lone, lambda index, share: self._run_perturbed(jobs[index], share)
        )
        if verdict.is_same:
            self._verified.add(mark)
            return results
        what = "its rows depend on each other"
        if mark.is_mixed or mark.is_padded:
            self._strict.add(module.name)
            what = "with unlike LoRAs or lengths " + what
        else:
            self._unjoinable.add(module.name)
        logger.warning(
            "forwards of %s are not shared: %s (one differs by %.2g of itself, rounding explains "
            "%.2g)",
            *(module.name, what, verdict.gap, verdict.rounding),
        )
        return lone

    def _run_uncounted(self, job: Job) -> Any:
        if job.call is not None and (job.module.in_buckets or job.module.has_cache):
            return self._run_call(job, job.call)
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            return job.module.run(*job.args, **job.kwargs)

    def _run_perturbed(self, job: Job, share: float) -> Any:
        assert job.call is not None  # noqa: S101 - it was joined
        return self._run_call(job, perturb(job.call, share))

    def _run_call(self, job: Job, call: Call) -> Any:
        rows = bucket(call.samples) if job.module.in_buckets else call.samples
        with self._bank.forwarding(job.module.component, [(job.member.lease, None)]):
            output = job.module.run(**join([call], rows))
        return split(output, [call.samples], rows, in_lists=call.in_lists)[0]

    def _run_together(self, jobs: list[Job]) -> list[Any]:
        module = jobs[0].module
        calls = [job.call for job in jobs if job.call is not None]
        counts = [call.samples for call in calls]
        rows = bucket(sum(counts)) if module.in_buckets else sum(counts)
        shares: list[tuple[Lease | None, int | None]] = [
            (job.member.lease, count) for job, count in zip(jobs, counts, strict=True)
        ]
        if rows > sum(counts):
            # Padding belongs to no request, and gets no LoRA.
            shares.append((None, rows - sum(counts)))
        arguments = join(calls, rows)
        stop = self._profile.start(module.device, jobs[0].kind, rows)
        with self._bank.forwarding(module.component, shares):
            output = module.run(**arguments)
        stop()
        parts = split(output, counts, rows, in_lists=calls[0].in_lists)
        mark = _Mark(
            (jobs[0].kind, calls[0].structure),
            is_mixed=len({job.pairs for job in jobs}) > 1,
            is_padded=len({call.lengths for call in calls}) > 1,
        )
        if len(jobs) > 1 and mark not in self._verified:
            parts = self._verify(jobs, mark, parts)
        self._count(jobs)
        for job, count in zip(jobs, counts, strict=True):
            job.member.calls[job.kind, count, job.is_step] += 1
        return parts

    def run_lone(self, job: Job) -> Any:
        """Runs a call with its own arguments, and returns what it returns."""
        rows = job.args[0].shape[0] if job.args and hasattr(job.args[0], "shape") else 1
        job.member.calls[job.kind, rows, job.is_step] += 1
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


def _marks(module: SharedModule, call: Call) -> tuple[Hashable, Hashable]:
    """What this call, and all of its structure, are remembered by."""
    return (module.name, call.key), (module.name, call.structure)
