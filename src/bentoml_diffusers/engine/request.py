"""One request: what was asked, the means to stop it, and what came of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import DeadlineExceeded, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image

    from bentoml_diffusers.adapters import Adapter


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, checked and resolved.

    Attributes:
        pipeline_class: Class whose method runs.
        method: Name of the method.
        arguments: Its arguments by name, without generators.
        seeds: One per image, or none where the caller brings generators or latents decide.
        scheduler_class: Class of the scheduler instead of the model's.
        loras: LoRAs of this request.
    """

    pipeline_class: type[DiffusionPipeline]
    method: str
    arguments: Mapping[str, Any]
    seeds: Sequence[int] = ()
    scheduler_class: type[SchedulerMixin] | None = None
    loras: Sequence[Adapter] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request; pickles.

    Attributes:
        output: The pipeline's output as a tuple, tensors on the CPU.
        seeds: The seeds really used, one per image.
        steps: Denoising steps done.
        queue_s: Seconds that the request waited.
        run_s: Seconds that it ran.
    """

    output: tuple[Any, ...]
    seeds: tuple[int, ...] = ()
    steps: int = 0
    queue_s: float = 0.0
    run_s: float = 0.0

    @property
    def images(self) -> list[Image.Image]:
        """Returns the pictures, which are the first entry of the output."""
        return list(self.output[0])


@dataclass
class Ticket:
    """Lets others stop a running request; it looks here between two denoising steps."""

    timeout_s: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    steps_done: int = 0
    steps_total: int | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Asks the request to stop."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises if the request must stop.

        Raises:
            RequestCancelled: 503, it was cancelled.
            DeadlineExceeded: 504, its time is over.
        """
        if self._cancelled.is_set():
            raise RequestCancelled
        if self.timeout_s is not None and time.monotonic() > self.submitted + self.timeout_s:
            raise DeadlineExceeded(self.timeout_s)


@dataclass(frozen=True)
class Handle:
    """A submitted request."""

    future: Future[Result]
    ticket: Ticket

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the result.

        Args:
            timeout: Seconds to wait; ``None`` waits for ever. The request goes on after it.

        Raises:
            TimeoutError: Not done in time.
            DiffusersError: Whatever became of the request.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Stops the request: at once if it waits, else before its next denoising step."""
        self.ticket.cancel()
        self.future.cancel()

    @property
    def progress(self) -> tuple[int, int | None]:
        """Denoising steps done, and in all (``None`` until that is known)."""
        return self.ticket.steps_done, self.ticket.steps_total
