"""One request: what was asked, the means to stop it, and what came of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.order import Work
from bentoml_diffusers.engine.requests.display import (
    describe_output,
    find_images,
    images_as_html,
    name_all,
    plural,
)
from bentoml_diffusers.engine.requests.files import save_output
from bentoml_diffusers.errors import DeadlineExceeded, RequestCancelled
from bentoml_diffusers.tasks import OutputLayout

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from PIL import Image

    from bentoml_diffusers.adapters import AdapterSet
    from bentoml_diffusers.engine.order import Estimate, Pace
    from bentoml_diffusers.engine.requests.schedulers import SchedulerChoice
    from bentoml_diffusers.media import Audio, Video
    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow.files import Workflow
    from bentoml_diffusers.workflow.replay import Canvas, Plan, ReplayReport


_FIRST = 1 / 10  # of the steps, before the first of several previews


@dataclass(frozen=True)
class PreviewPlan:
    """After which steps a request makes previews; by default after none.

    Attributes:
        every: Steps between two of them.
        count: How many, spread over the steps: the first one after a tenth of them, since the
            predicted clean image is recognisable by then.
        interval_s: Seconds between two of them, at least; alone: as many as that allows.
        is_full: They are decoded by the autoencoder; else coarse, and next to free.
    """

    every: int = 0
    count: int = 0
    interval_s: float = 0.0
    is_full: bool = True

    def is_due(self, done: int, total: int, since_s: float) -> bool:
        """True if there is to be one after a step; never after the last.

        Args:
            done: Steps that are done.
            total: Steps in all.
            since_s: Seconds since the last preview.
        """
        if done >= total or since_s < self.interval_s:
            return False
        if self.every or self.count:
            return done in self._points(total) or bool(self.every and done % self.every == 0)
        return self.interval_s > 0

    def _points(self, total: int) -> set[int]:
        shares = (_FIRST + (1 - _FIRST) * index / self.count for index in range(self.count))
        return {max(1, round(share * total)) for share in shares}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to record of a request.

    Attributes:
        task: As it was asked for.
        arguments: All arguments of the method, as they were given.
        scheduler: Name of a scheduler, as it was asked for.
        returns_workflow: The result has the workflow.
        keep_size: The answer has the size of the image that came.
        plan: The replay that the request is.
    """

    task: str
    arguments: Mapping[str, Any]
    scheduler: object = None
    returns_workflow: bool = False
    keep_size: bool = False
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, checked and resolved.

    Attributes:
        task: What was asked for.
        pipeline_class: Class whose method runs.
        method: Name of the method.
        arguments: Its arguments by name, without generators.
        seeds: One per image, or none where the caller brings generators or latents decide.
        scheduler: Scheduler instead of the model's.
        guidance_scale: For the guider of a modular pipeline, where it is not an argument.
        adapters: LoRAs and textual inversions of this request.
        exclusive: No other request may run beside it.
        pixel_steps: Size of the work: pixels times images times steps.
        pixels: Size of one step of it.
        caller: Who asks.
        priority: From -8 to 8.
        previews: After which steps it makes previews.
        recording: What to record of it, if anything.
        canvas: Restores the size of the image that came.
        max_sequence_length: Tokens of a prompt that text encoders other than CLIP read.
    """

    task: Task
    pipeline_class: type[DiffusionPipeline]
    method: str
    arguments: Mapping[str, Any]
    adapters: AdapterSet
    seeds: Sequence[int] = ()
    scheduler: SchedulerChoice | None = None
    guidance_scale: float | None = None
    exclusive: bool = False
    pixel_steps: int = 0
    pixels: int = 1
    caller: str = ""
    priority: int = 0
    previews: PreviewPlan = PreviewPlan()
    recording: Recording | None = None
    canvas: Canvas | None = None
    max_sequence_length: int | None = None

    @property
    def signature(self) -> Hashable:
        """Requests of equal signature cost the same for each step."""
        guidance = self.arguments.get("guidance_scale", self.guidance_scale)
        is_guided = guidance > 1 if isinstance(guidance, (int, float)) else None
        size = self.arguments.get("height"), self.arguments.get("width")
        return self.pipeline_class, self.method, self.pixels, *size, is_guided

    def work(self, ticket: Ticket, pace: Pace | None = None) -> Work:
        """Returns what the order of work needs to know of it."""
        return Work(
            caller=self.caller,
            priority=self.priority,
            pixels=self.pixels,
            steps=self.pixel_steps // self.pixels,
            ticket=ticket,
            deadline=ticket.deadline,
            pace=pace,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What came of a request, and how; pickles. A notebook shows its images.

    Attributes:
        output: The pipeline's output as a tuple, tensors on the CPU.
        layout: What each value of it is.
        seeds: The seeds really used, one per image.
        scheduler: Name of the scheduler's class, empty for a pipeline without one.
        steps: Denoising steps done.
        adapters: Names of the LoRAs and textual inversions that the request named.
        batches: How many of its forwards were shared by how many requests: ``{1: 4, 3: 16}``.
        queue_s: Seconds that the request waited.
        run_s: Seconds that it ran.
        workflow: What repeats it, where that was asked for.
        replay: How the replay of a workflow went.
        nsfw_content_detected: What the model's safety checker said of each image; none without
            one. A flagged image is black.
        warnings: What was not done as it was written: tokens that a text encoder cut off, syntax
            of other programs that was read as letters, images that were flagged.
    """

    output: tuple[Any, ...]
    layout: OutputLayout = field(default_factory=OutputLayout)
    seeds: tuple[int, ...] = ()
    scheduler: str = ""
    steps: int = 0
    adapters: tuple[str, ...] = ()
    batches: Mapping[int, int] = field(default_factory=dict)
    queue_s: float = 0.0
    run_s: float = 0.0
    workflow: Workflow | None = None
    replay: ReplayReport | None = None
    nsfw_content_detected: tuple[bool, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """Returns the images: PIL images, or what ``output_type`` says; none of video and audio.

        Where nothing names the output, they are its first value.
        """
        return self.layout.images(self.output)

    @property
    def videos(self) -> list[Video]:
        """Returns the videos, with their frames per second, and their sound where there is any."""
        return self.layout.videos(self.output)

    @property
    def audios(self) -> list[Audio]:
        """Returns the sound, also that of the videos, with its sampling rate."""
        return self.layout.audios(self.output)

    @property
    def latents(self) -> Any:
        """Returns the latents, with ``output_type="latent"``; else ``None``."""
        return next(iter(self.layout.find("latents", self.output)), None)

    @property
    def named_output(self) -> Mapping[str, Any]:
        """Returns all values of the output by the names that the pipeline's class gives them."""
        return self.layout.name_all(self.output)

    def save(
        self, path: str | os.PathLike[str], *, infotext: bool = False, codec: str = "h264"
    ) -> list[Path]:
        """Writes images, videos or sound into files, with the workflow if the result has one.

        The suffix says what: ``.png``, ``.jpg``, ``.jpeg``, ``.webp`` for images; ``.mp4`` and
        ``.webm`` for videos with their sound, ``.webp`` and ``.gif`` for animations; ``.wav``,
        ``.flac``, ``.mp3``, ``.opus`` for sound alone. Of several results each file has its number
        before the suffix. A workflow that the file has no place for is a ``.json`` beside it.

        Args:
            path: Of the file.
            infotext: Write the text of AUTOMATIC1111's web UI into images, too.
            codec: ``"h264"`` or ``"av1"``, of an MP4.

        Returns:
            The files.

        Raises:
            InvalidRequest: 400, a suffix for something that the result does not have.
            CodecMissing: 501, PyAV is not installed (``pip install 'bentoml-diffusers[video]'``).
            StorageFull: 507, no space left.
        """
        return save_output(
            self.output, self.layout, self.workflow, path, infotext=infotext, codec=codec
        )

    @property
    def was_batched(self) -> bool:
        """True if another request shared one of its forwards."""
        return any(size > 1 for size in self.batches)

    def __repr__(self) -> str:
        """One line without tensors and prompts, which logs and tracebacks would keep."""
        facts = (
            self._describe(),
            name_all("seed", self.seeds),
            plural(self.steps, "step") if self.steps else "",
            name_all("adapter", self.adapters),
            "batched" if self.was_batched else "",
            f"{self.run_s:.2f} s",
            "with its workflow" if self.workflow is not None else "",
            plural(len(self.warnings), "warning") if self.warnings else "",
        )
        return f"<Result: {', '.join(filter(None, facts))}>"

    def _describe(self) -> str:
        media = [repr(one).strip("<>") for one in self.videos or self.audios]
        return ", ".join(media) or (describe_output(self.output[0]) if self.output else "nothing")

    def _repr_html_(self) -> str:
        """Returns what a notebook shows."""
        return images_as_html(find_images(self.output[0]) if self.output else [], repr(self))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step that a request has done.

    Attributes:
        step: Denoising steps done.
        total: Steps in all.
        preview: What the image looks like so far, where that was asked for; size in pixels as
            the final one.
    """

    step: int
    total: int
    preview: Image.Image | None = None


@dataclass
class Ticket:
    """Lets others stop and watch a running request."""

    timeout_s: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    steps_done: int = 0
    steps_total: int | None = None
    on_step: Callable[[Progress], None] | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def deadline(self) -> float | None:
        """Moment on the monotonic clock at which the request must stop."""
        return None if self.timeout_s is None else self.submitted + self.timeout_s

    @property
    def must_stop(self) -> bool:
        """True if :meth:`check` would raise."""
        return self._cancelled.is_set() or self.is_late

    @property
    def is_late(self) -> bool:
        """True if its time is over."""
        deadline = self.deadline
        return deadline is not None and time.monotonic() > deadline

    def part(self, on_step: Callable[[Progress], None]) -> Ticket:
        """Returns a ticket that stops with this one, and counts its own steps."""
        return Ticket(self.timeout_s, self.submitted, on_step=on_step, _cancelled=self._cancelled)

    def cancel(self) -> None:
        """Asks the request to stop; one that is late has to already, and stays late."""
        if not self.is_late:
            self._cancelled.set()

    def check(self) -> None:
        """Raises if the request must stop.

        Raises:
            RequestCancelled: 503, it was cancelled.
            DeadlineExceeded: 504, its time is over.
        """
        if not self.must_stop:
            return
        if self._cancelled.is_set() or self.timeout_s is None:
            raise RequestCancelled
        raise DeadlineExceeded(self.timeout_s)

    def count_step(self, total: int, preview: Image.Image | None = None) -> None:
        """Notes that a denoising step is done."""
        self.steps_done += 1
        self.steps_total = total
        if self.on_step is not None:
            self.on_step(Progress(step=self.steps_done, total=total, preview=preview))


@dataclass(frozen=True)
class Handle:
    """A submitted request."""

    future: Future[Result]
    ticket: Ticket
    _withdraw: Callable[[], None]
    _look: Callable[[], Estimate]

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
        """Stops the request: at once if it waits, else before its next forward."""
        self.ticket.cancel()
        self._withdraw()

    @property
    def estimate(self) -> Estimate:
        """Where it stands: its position in the queue, seconds until it starts and is done.

        Seconds are known once requests like it, and like those before it, have been done. They
        foresee none that is still to come. Takes milliseconds where many wait: not for each step.
        """
        return self._look()

    @property
    def progress(self) -> tuple[int, int | None]:
        """Denoising steps done, and in all (``None`` until that is known)."""
        return self.ticket.steps_done, self.ticket.steps_total
