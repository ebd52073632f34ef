"""Splits a request for several images from one into a request for each of them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.requests.request import PreviewPlan
from bentoml_diffusers.tasks.checks import count_images
from bentoml_diffusers.workflow.replay import join_outputs, split_by_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bentoml_diffusers.engine.requests.request import Progress, Request, Result, Ticket

    RunPart = Callable[[Request, Ticket], Result]


def split_request(request: Request) -> list[Request]:
    """Returns a request for each image, in order; often just the original.

    Only the first one makes previews.
    """
    others = dict(request.arguments)
    generators = others.pop("generator", None)
    own = generators if isinstance(generators, list) else []
    count = len(request.seeds or own)
    calls = split_by_image(others, count)
    if len(calls) == 1 or count != count_images(others):
        return [request]
    return [
        replace(
            request,
            arguments={**arguments, **({"generator": own[image]} if own else {})},
            seeds=request.seeds[image : image + 1],
            pixels=max(1, request.pixels // len(calls)),
            pixel_steps=request.pixel_steps // len(calls),
            previews=PreviewPlan() if image else request.previews,
        )
        for image, arguments in enumerate(calls)
    ]


def run_parts(parts: Sequence[Request], ticket: Ticket, run: RunPart, threads: int) -> Result:
    """Runs the parts of a request and returns the result of the whole.

    Args:
        parts: From :func:`split_request`.
        ticket: Ticket of the whole; stops all parts, and counts a step when each has done it.
        run: Runs one part.
        threads: Number of parts that may run at once.
    """
    progress = _Progress(ticket, len(parts))
    with ThreadPoolExecutor(min(threads, len(parts)), "image") as pool:
        results = list(pool.map(run, parts, progress.tickets))
    first = results[0]
    batches: Counter[int] = Counter()
    for result in results:
        batches.update(result.batches)
    warnings = dict.fromkeys(text for result in results for text in result.warnings)
    flags = (flag for result in results for flag in result.nsfw_content_detected)
    return replace(
        first,
        output=join_outputs([result.output for result in results]),
        seeds=tuple(seed for result in results for seed in result.seeds),
        batches=dict(batches),
        queue_s=min(result.queue_s for result in results),
        run_s=max(result.queue_s + result.run_s for result in results)
        - min(result.queue_s for result in results),
        nsfw_content_detected=tuple(flags),
        warnings=tuple(warnings),
    )


class _Progress:
    """Tickets for the parts of a request; a step of the whole is a step of each."""

    def __init__(self, whole: Ticket, count: int) -> None:
        self._whole = whole
        self._preview: Any = None
        self.tickets = [whole.part(self._notice) for _ in range(count)]

    def _notice(self, step: Progress) -> None:
        """By the holder of the baton."""
        self._preview = step.preview or self._preview
        done = sum(ticket.steps_done for ticket in self.tickets) // len(self.tickets)
        if done > self._whole.steps_done:
            preview, self._preview = self._preview, None
            self._whole.count_step(step.total, preview)
