"""Runs the calls of all dialects: one object in each worker of a service.

Limits, metrics, workflows in images and cancelling are here, the same for all. A dialect
translates a request into a :class:`Call`, and an :class:`Answer` or events into its own form.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine import Result, charge_now, expect_parts
from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.serving.calls import (
    Answer,
    Call,
    Done,
    Preview,
    Queued,
    Step,
)
from bentoml_diffusers.serving.choices import to_arguments
from bentoml_diffusers.serving.connections import watching
from bentoml_diffusers.serving.encoding import encode_result, stream_result
from bentoml_diffusers.serving.frames import check_frames
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.replays import run_replay
from bentoml_diffusers.serving.running import Running
from bentoml_diffusers.serving.sizes import check_whole_size, has_size_of_image

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping

    from starlette.types import Receive

    from bentoml_diffusers.engine import Engine, Progress
    from bentoml_diffusers.errors import Outcome
    from bentoml_diffusers.serving.calls import Caller, Event
    from bentoml_diffusers.serving.encoding import Encoded, Streamed
    from bentoml_diffusers.serving.reader import RequestModel
    from bentoml_diffusers.serving.replays import ReplayCall
    from bentoml_diffusers.serving.running import Run

NOTHING = EmbedOptions()


class Dispatcher:
    """Runs calls on an engine. For the thread of one event loop.

    Args:
        engine: What runs them; an object with its ``arun``, ``stream``, ``areplay``, ``check``,
            ``report``,
            ``look_at_queue``, ``find_task`` and ``pipeline`` may stand for it.
        requests: What the service takes, with its limits, by task.
        embed: What is written into the images.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Mapping[str, type[RequestModel]],
        embed: EmbedOptions = NOTHING,
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.embed = embed
        self._running = Running()

    async def read(self, task: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Checks values by the fields of a task, as those of a native request are checked.

        So a dialect translates names and values, and says no limits of its own.

        Args:
            task: One of :attr:`requests`.
            values: By the names of the native fields; a file as bytes or in base64.

        Returns:
            Arguments for :class:`Call`.

        Raises:
            UnreadableRequest: 400, says which fields are wrong; by their native names.
        """
        request = await self.requests[task].from_values(values)
        return to_arguments({name: getattr(request, name) for name in type(request).model_fields})

    async def check(self, call: Call) -> None:
        """Checks a call as :meth:`run` does, and raises what that raises; runs nothing.

        Its caller pays for it now, since somebody else will run it.
        """
        checks = (
            asyncio.to_thread(self.engine.check, call.task, **part) for part in self._prepare(call)
        )
        charge_now(call.task, max(await asyncio.gather(*checks)))  # the payer counts the parts

    async def run(self, call: Call, receive: Receive | None = None) -> Answer:
        """Runs a call; cancelling the awaiting task cancels it.

        Args:
            call: What to run.
            receive: Of the HTTP request, whose body was read: a client that goes away stops it.

        Raises:
            InvalidRequest: 400, something is wrong with it.
            AdapterNotFound: 404, no such adapter.
            QueueFull: 429, too many requests wait.
            RequestCancelled: 503, by its caller, or the service ends.
            DeadlineExceeded: 504, its time is over.
        """
        with self._counted(call.task, call, receive) as run:
            parts = self._prepare(call)
            on_step = process_metrics().count_steps(call.task)
            tasks = [
                run.start(self.engine.arun(call.task, **{**part, "on_step": on_step}))
                for part in parts
            ]
            results = await run.wait(tasks)
        answer = Answer(request_id=call.request_id, results=tuple(results))
        process_metrics().note_result(call.task, answer)
        return answer

    async def stream(self, call: Call, receive: Receive | None = None) -> AsyncGenerator[Event]:
        """Runs a call and yields what happens, last its answer. Closing it cancels the call.

        Args:
            call: What to run.
            receive: As for :meth:`run`.

        Raises:
            DiffusersError: As :meth:`run`.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        with self._counted(call.task, call, receive, cancelled="cancelled") as run:
            parts = self._prepare(call)
            queue = self.engine.look_at_queue()
            for index, part in enumerate(parts):
                pump = run.start(self._pump(call, index, part, events.put_nowait))
                pump.add_done_callback(lambda _: events.put_nowait(None))
            await asyncio.sleep(0)  # now all of them were submitted to the engine, or refused
            run.check()
            yield Queued(queue.waiting, queue.seconds)
            results: dict[int, Result] = {}
            ended = 0
            while ended < len(parts):
                event = await events.get()
                if event is None:
                    run.check()
                    ended += 1
                    continue
                if isinstance(event, Done):
                    results[event.index] = event.result
                yield event
        ordered = tuple(results[index] for index in range(len(parts)))
        answer = Answer(request_id=call.request_id, results=ordered)
        process_metrics().note_result(call.task, answer)
        yield answer

    async def replay(self, call: ReplayCall, receive: Receive | None = None) -> Answer:
        """Repeats a workflow.

        Args:
            call: What to repeat.
            receive: As for :meth:`run`.

        Raises:
            DiffusersError: As :meth:`run`.
            WorkflowMismatch: 409, something else is here than it was made with.
        """
        with self._counted("replay", call, receive) as run:
            work = run_replay(self.engine, self.requests, call, records=self._records)
            results = await run.wait([run.start(work)])
        answer = Answer(request_id=call.request_id, results=tuple(results))
        process_metrics().note_result("replay", answer)
        return answer

    async def encode(
        self, result: Result, output_format: str, quality: int | None = None
    ) -> Encoded:
        """Encodes a result beside the event loop, with what is to be in its file.

        Args:
            result: With the image, video or sound.
            output_format: Of the file.
            quality: Of JPEG and WebP, 0 to 100; ``None`` for the usual one.

        Raises:
            CodecMissing: 501, PyAV is not installed.
            PipelineFailed: 500, sound that holds NaN.
        """
        return await asyncio.to_thread(encode_result, result, output_format, self.embed, quality)

    async def stream_file(self, result: Result, output_format: str) -> Streamed:
        """Begins to encode a video or sound; the rest as it is read. Raises as :meth:`encode`."""
        return await asyncio.to_thread(stream_result, result, output_format, self.embed)

    def cancel(self, request_id: str, caller: Caller, reason: str = "cancelled") -> bool:
        """Cancels what a caller runs under an id, within one step; ``False`` if there is nothing.

        In this worker only: others have callers of their own.
        """
        return self._running.cancel(request_id, caller, reason)

    @contextlib.contextmanager
    def _counted(
        self,
        label: str,
        call: Call | ReplayCall,
        receive: Receive | None,
        cancelled: Outcome = "expired",
    ) -> Iterator[Run]:
        """Gives the run of a call, which can be cancelled, and counts what becomes of it.

        A task that awaits an answer is cancelled by BentoML's timeout, where one forward takes
        longer than the engine's is shorter; one that writes a stream when its client goes away.
        """
        metrics = process_metrics()
        try:
            with self._running.add(call.request_id, call.caller) as run, watching(receive, run):
                yield run
        except DiffusersError as error:
            metrics.note_error(label, error)
            raise
        except asyncio.CancelledError:
            metrics.note_outcome(label, cancelled)
            raise
        except GeneratorExit:
            metrics.note_outcome(label, "cancelled")
            raise

    @property
    def _records(self) -> bool:
        return self.embed.workflow or self.embed.infotext

    def _prepare(self, call: Call) -> list[dict[str, Any]]:
        """Returns the arguments of the engine for each image.

        Raises:
            InvalidRequest: 400, larger than the limits allow.
        """
        limits = self.requests[call.task].limits
        arguments = {**call.arguments, **call.caller.options}
        if has_size_of_image(self.engine.find_task(call.task), arguments):
            arguments["keep_size"] = True
        check_whole_size(self.engine, call.task, limits, arguments)
        check_frames(self.engine, call.task, limits, arguments)
        if self._records:
            arguments["return_workflow"] = True
        parts = replace(call, arguments=arguments).split()
        expect_parts(len(parts))
        return parts

    async def _pump(
        self, call: Call, index: int, arguments: dict[str, Any], tell: Callable[[Event], None]
    ) -> None:
        """Tells what happens to one image."""
        count_step = process_metrics().count_steps(call.task)
        previews = call.previews
        if previews is not None:
            arguments["preview_count"] = previews.count
            arguments["preview_interval_s"] = previews.interval_s
            arguments["preview_quality"] = "full" if previews.is_full else "fast"
        pace = _Pace()
        async with contextlib.aclosing(self.engine.stream(call.task, **arguments)) as events:
            async for event in events:
                if isinstance(event, Result):
                    tell(Done(index, event))
                    continue
                count_step(event)
                tell(Step(index, event.step, event.total, pace.seconds_left(event)))
                if event.preview is not None:
                    tell(Preview(index, event.step, event.total, event.preview))


class _Pace:
    """How fast a request does its steps, not counting the time before its first one."""

    def __init__(self) -> None:
        self._began: tuple[int, float] | None = None

    def seconds_left(self, step: Progress) -> float | None:
        now = time.monotonic()
        if self._began is None:
            self._began = (step.step, now)
            return None
        done = step.step - self._began[0]
        return (now - self._began[1]) / done * (step.total - step.step) if done else None
