"""The engine: one set of weights, any number of callers, shared forwards."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_diffusers._compat import compile_in_place
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.engine.admission import Admission, Entry
from bentoml_diffusers.engine.devices import default_device
from bentoml_diffusers.engine.estimates import Estimates
from bentoml_diffusers.engine.event_loop import submit_beside, tell, wait_for
from bentoml_diffusers.engine.host import EngineHost
from bentoml_diffusers.engine.payment import charged
from bentoml_diffusers.engine.recorder import Recorder
from bentoml_diffusers.engine.replays import make_arguments
from bentoml_diffusers.engine.report import EngineReport, QueueReport
from bentoml_diffusers.engine.requests import (
    Handle,
    Progress,
    Result,
    Ticket,
)
from bentoml_diffusers.engine.resolver import Resolver
from bentoml_diffusers.engine.worker import Worker
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.loading import load_pipeline, stored_options
from bentoml_diffusers.options import EngineLimits, ModelOptions
from bentoml_diffusers.store import get
from bentoml_diffusers.tasks import RequestOptions, find_tasks, shows_options
from bentoml_diffusers.workflow.replay import plan_replay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from types import TracebackType

    from bentoml import Tag
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Task
    from bentoml_diffusers.workflow import Workflow
    from bentoml_diffusers.workflow.replay import Plan


class Engine:
    """Runs requests of many callers on one pipeline.

    Each request runs the ordinary ``__call__`` of its pipeline, on a view with its own scheduler
    over the shared weights. Requests that run at once share the forwards of the modules wherever
    shapes allow; a lone one equals diffusers' own call bit for bit. Safe to call from any number
    of threads.

    Args:
        pipeline: A diffusers pipeline; the engine owns it until :meth:`close`. Modules that
            ``torch.compile`` wrapped become modules that are compiled in their place.
        options: Adapters, and the sources of those in requests.
        limits: How much the engine takes on at once.
        model: The stored model that the pipeline is from; workflows name it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        options: ModelOptions | None = None,
        limits: EngineLimits | None = None,
        model: bentoml.Model | None = None,
    ) -> None:
        compile_in_place(pipeline)
        self.pipeline = pipeline
        self.options = options or ModelOptions()
        self.limits = limits or EngineLimits()
        self._bank = AdapterBank(pipeline, self.options)
        self._worker = Worker(pipeline, self._bank, self.limits)
        self._admission = Admission(self.limits, self._run)
        self._estimates = Estimates(self._admission, self._worker)
        self._tasks = find_tasks(pipeline, self.options.modular_workflow)
        self._resolver = Resolver(pipeline, self._bank, self._tasks)
        self._host = EngineHost(
            pipeline, self.options, model, self._tasks, self._bank, self._worker.in_turn
        )
        self._recorder = Recorder(self._host)
        name = (
            type(pipeline).__name__ if model is None else f"{type(pipeline).__name__} {model.tag}"
        )
        self._title = f"{name} on {self._host.device}"

    @classmethod
    @shows_options(ModelOptions)
    def from_model(
        cls,
        model: str | Tag | bentoml.Model | DiffusionPipeline,
        *,
        device: str | None = None,
        limits: EngineLimits | None = None,
        **options: Any,
    ) -> Engine:
        """Makes an engine from a stored model or from a pipeline.

        Args:
            model: A tag, a ``bentoml.Model``, or a diffusers pipeline.
            device: Where to run; ``None`` takes the GPU if there is one.
            limits: How much the engine takes on at once.
            **options: See :class:`bentoml_diffusers.ModelOptions`; they override those stored
                with the model.

        Raises:
            ModelNotFound: 404, no such model.
            InvalidOption: 400, an unknown option or a wrong value.
            InvalidModel: 400, the model cannot be loaded.
        """
        given = ModelOptions.from_mapping(options)
        if not isinstance(model, (str, bentoml.Tag, bentoml.Model)):
            return cls(model, given, limits)
        stored = model if isinstance(model, bentoml.Model) else get(model)
        merged = stored_options(stored).overridden_by(given)
        pipeline = load_pipeline(stored, merged, device or default_device())
        return cls(pipeline, merged, limits, stored)

    @shows_options(RequestOptions)
    def run(
        self, task: str, /, *args: Any, options: RequestOptions | None = None, **arguments: Any
    ) -> Result:
        """Runs a request and waits for it. See :meth:`submit`."""
        return self.submit(task, *args, options=options, **arguments).result()

    @shows_options(RequestOptions)
    async def arun(
        self, task: str, /, *args: Any, options: RequestOptions | None = None, **arguments: Any
    ) -> Result:
        """Runs a request; cancelling the awaiting task cancels it. See :meth:`submit`."""
        return await wait_for(self.submit(task, *args, options=options, **arguments))

    @shows_options(RequestOptions)
    async def stream(
        self, task: str, /, *args: Any, options: RequestOptions | None = None, **arguments: Any
    ) -> AsyncGenerator[Progress | Result]:
        """Runs a request and yields each step when it is done, and at last the result.

        Leaving the loop cancels the request. For the arguments see :meth:`submit`; with
        ``preview_every``, ``preview_count`` or ``preview_interval_s`` steps come with previews.
        """
        chosen = arguments.get("on_step", options and options.on_step)
        if chosen is not None:
            raise InvalidRequest("on_step", chosen, "None: a stream yields the steps itself")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | None] = asyncio.Queue()
        ticket = Ticket()

        def notice(step: Progress) -> None:
            if not tell(loop, events.put_nowait, step):
                ticket.cancel()

        handle = self._submit(ticket, task, args, {**arguments, "on_step": notice}, base=options)
        handle.future.add_done_callback(lambda _: tell(loop, events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield handle.result(0)
        finally:
            handle.cancel()

    @shows_options(RequestOptions)
    def submit(
        self, task: str, /, *args: Any, options: RequestOptions | None = None, **arguments: Any
    ) -> Handle:
        """Checks a request and queues it.

        Args:
            task: ``"txt2img"``, ``"img2img"``, ``"inpaint"``, or a method of the pipeline's
                class such as ``"__call__"``; of a modular pipeline a modular workflow such as
                ``"controlnet_text2image"``.
            *args: Arguments of the pipeline.
            options: What the request asks of the engine; each of its fields may be given as a
                keyword instead, such as ``seed=7``. See :class:`RequestOptions`.
            **arguments: Arguments of the pipeline, and fields of :class:`RequestOptions`.

        Raises:
            InvalidRequest: 400, an argument is unknown or invalid.
            UntrustedSource: 400, an adapter from a source that is not allowed.
            AdapterNotFound: 404, no such adapter.
            QueueFull: 429, too many requests wait.
            DeadlineUnreachable: 503, those before it leave too little of its ``timeout_s``.
            DeadlineExceeded: 504, it would take longer than that alone, too.
            RequestCancelled: 503, the engine is closed.
        """
        return self._submit(Ticket(), task, args, arguments, base=options)

    @shows_options(RequestOptions)
    def check(
        self, task: str, /, *args: Any, options: RequestOptions | None = None, **arguments: Any
    ) -> int:
        """Checks a request as :meth:`submit` does, and raises what that raises; runs nothing.

        It reads no file: that of a LoRA may still turn out to be broken.

        Returns:
            Its work: pixels times images times steps.
        """
        chosen, own = RequestOptions.split(arguments, options)
        return self._resolver.resolve(task, args, own, chosen, None).pixel_steps

    def replay(self, workflow: Workflow, /, *, strict: bool = True, **overrides: Any) -> Result:
        """Repeats a workflow and waits for it. See :meth:`submit_replay`."""
        return self.submit_replay(workflow, strict=strict, **overrides).result()

    async def areplay(self, workflow: Workflow, /, **arguments: Any) -> Result:
        """Repeats a workflow; cancelling the awaiting task cancels it. See :meth:`submit_replay`.

        Files are read and images decoded in a thread, not in the event loop.
        """
        submit = functools.partial(self.submit_replay, workflow, **arguments)
        return await wait_for(await submit_beside(submit))

    def submit_replay(
        self,
        workflow: Workflow,
        /,
        *,
        strict: bool = True,
        limits: RequestLimits | None = None,
        **overrides: Any,
    ) -> Handle:
        """Checks a workflow against this engine and queues its repetition, which runs alone.

        Pipeline, model, code and adapters must be the same. Versions and devices may differ:
        :attr:`Result.replay` names them, and tells whether the output is the same. Reads the files
        of adapters whose hash is not known yet.

        Args:
            workflow: From an earlier request, or from :func:`bentoml_diffusers.run_with_workflow`.
            strict: ``False`` runs it in spite of differences, and only reports them.
            limits: Limits of a service, for an untrusted workflow.
            **overrides: Arguments of :meth:`submit` to change, such as ``negative_prompt`` or
                ``seed``.

        Raises:
            WorkflowMismatch: 409, something differs, and it is strict.
            InvalidWorkflow: 400, something in it cannot be.
            InvalidRequest: 400, an argument is unknown or invalid.
            AdapterNotFound: 404, no such adapter, and it is strict.
            QueueFull: 429, too many requests wait.
            RequestCancelled: 503, the engine is closed.
            DeadlineExceeded: 504, the time was over before everything was read.
        """
        ticket = Ticket()
        with self._admission.counting_refusals():
            self._prepare(ticket, RequestOptions.split(overrides)[0])
            host = self._host.within(ticket)
            plan = plan_replay(host, workflow, overrides, strict=strict, limits=limits)
        return self._submit(ticket, plan.name, (), make_arguments(plan, overrides), plan)

    @property
    def is_ready(self) -> bool:
        """False once the engine is closed, or cannot schedule requests any more."""
        return not (self._admission.is_closed or self._worker.conductor.is_broken)

    def report(self) -> EngineReport:
        """Returns the state and statistics of the engine. Thread-safe."""
        return EngineReport(
            running=self._admission.running,
            waiting=self._admission.waiting,
            counts=self._admission.counts,
            forwards=self._worker.conductor.forwards,
            seconds_per_row=self._worker.conductor.profile.table(),
            adapters=self._bank.report(),
        )

    def look_at_queue(self) -> QueueReport:
        """Returns the length of the queue. Cheap and thread-safe."""
        return self._admission.look_at_queue()

    def close(self, *, cancel: bool = False) -> None:
        """Stops the engine.

        Args:
            cancel: Stop running and waiting requests; else finish them first.
        """
        self._admission.close(cancel=cancel)
        self._bank.close()

    def __repr__(self) -> str:
        state = self._admission
        load = f"{state.running} running, {state.waiting} waiting"
        return f"<Engine: {self._title}, {'closed' if state.is_closed else load}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=error is not None)

    def find_task(self, name: str) -> Task:
        """Returns a task: its inputs and output.

        Args:
            name: See :meth:`submit`.

        Raises:
            InvalidRequest: 400, the pipeline has no such task.
        """
        return self._tasks.find(name)

    def _submit(
        self,
        ticket: Ticket,
        name: str,
        args: tuple[Any, ...],
        given: Mapping[str, Any],
        plan: Plan | None = None,
        base: RequestOptions | None = None,
    ) -> Handle:
        with self._admission.counting_refusals():
            options, arguments = RequestOptions.split(given, base)
            self._prepare(ticket, options)
            request = self._resolver.resolve(name, args, arguments, options, plan)
            entry = Entry(request, ticket)
            with charged(name, request.pixel_steps, entry.future):
                self._estimates.check_deadline(entry)
                self._admission.submit(entry)
        return Handle(
            entry.future,
            ticket,
            lambda: self._admission.withdraw(entry),
            lambda: self._estimates.look(entry),
        )

    def _prepare(self, ticket: Ticket, options: RequestOptions) -> None:
        ticket.on_step = options.on_step
        ticket.timeout_s = options.timeout_s or self.limits.timeout_s

    def _run(self, entry: Entry) -> Result:
        captured = self._recorder.begin(entry.request, entry.ticket)
        result = self._worker.run(entry)
        return self._recorder.finish(entry.request, captured, result)
