"""The engine: one set of weights, any number of callers, shared forwards."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_diffusers._compat import compile_in_place
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.engine.admission import Admission, Entry
from bentoml_diffusers.engine.awaiting import submit_beside, tell, wait_for
from bentoml_diffusers.engine.devices import default_device
from bentoml_diffusers.engine.recording import Recorder
from bentoml_diffusers.engine.replaying import Planner
from bentoml_diffusers.engine.report import EngineReport
from bentoml_diffusers.engine.request import (
    Handle,
    Plan,
    Progress,
    Result,
    Ticket,
    check_timeout,
)
from bentoml_diffusers.engine.resolving import Resolver
from bentoml_diffusers.engine.worker import Worker
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.loading import load_pipeline, stored_options
from bentoml_diffusers.options import EngineLimits, ModelOptions
from bentoml_diffusers.store import get

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

    from bentoml import Tag
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.engine.arguments import Parameters
    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.workflow import Workflow


class Engine:
    """Runs requests of many callers on one pipeline.

    Each request runs the ordinary ``__call__`` of its pipeline, on a view with its own scheduler
    over the shared weights. Requests that run at once share the forwards of the modules wherever
    shapes allow; a lone one equals diffusers' own call bit for bit. Safe to call from any number
    of threads.

    Args:
        pipeline: A diffusers pipeline; the engine owns it until :meth:`close`. Modules that
            ``torch.compile`` wrapped become modules that are compiled in their place.
        options: Adapters and where requests may take theirs from.
        limits: How much is taken on at once.
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
        self._recorder = Recorder(pipeline, self.options, model, self._worker.in_turn)
        self._admission = Admission(self.limits, self._run)
        self._resolver = Resolver(pipeline, self._bank, self.options.modular_workflow)
        self._planner = Planner(
            pipeline, self._recorder, self._bank, lambda task: self.find_call(task)[2]
        )

    @classmethod
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
            limits: How much is taken on at once.
            **options: See :class:`bentoml_diffusers.ModelOptions`; they override what is stored
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

    def run(self, task: str, /, *args: Any, **arguments: Any) -> Result:
        """Runs a request and waits for it. See :meth:`submit`."""
        return self.submit(task, *args, **arguments).result()

    async def arun(self, task: str, /, *args: Any, **arguments: Any) -> Result:
        """Runs a request; cancelling the awaiting task cancels it. See :meth:`submit`."""
        return await wait_for(self.submit(task, *args, **arguments))

    async def stream(
        self, task: str, /, *args: Any, preview_every: int = 0, **arguments: Any
    ) -> AsyncIterator[Progress | Result]:
        """Runs a request and yields each step as it is done, last the result.

        Leaving the loop cancels the request.

        Args:
            task: See :meth:`submit`.
            *args: See :meth:`submit`.
            preview_every: Steps between two previews, each decoded by the autoencoder; 0 for none.
            **arguments: See :meth:`submit`.
        """
        if "on_step" in arguments:
            raise InvalidRequest("on_step", arguments["on_step"], "none: a stream yields the steps")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | None] = asyncio.Queue()
        ticket = Ticket()

        def notice(step: Progress) -> None:
            if not tell(loop, events.put_nowait, step):
                ticket.cancel()

        given = {**arguments, "preview_every": preview_every, "on_step": notice}
        handle = self._submit(ticket, task, args, given)
        handle.future.add_done_callback(lambda _: tell(loop, events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield handle.result(0)
        finally:
            handle.cancel()

    def submit(
        self,
        task: str,
        /,
        *args: Any,
        seed: int | list[int] | None = None,
        scheduler: str | type[Any] | None = None,
        lora_weights: Any = None,
        textual_inversions: Any = None,
        exclusive: bool = False,
        timeout_s: float | None = None,
        return_workflow: bool = False,
        keep_size: bool = False,
        on_step: Callable[[Progress], None] | None = None,
        **arguments: Any,
    ) -> Handle:
        """Checks a request and queues it.

        Args:
            task: ``"txt2img"``, ``"img2img"``, ``"inpaint"``, or a method of the pipeline's
                class such as ``"__call__"``; of a modular pipeline a modular workflow such as
                ``"controlnet_text2image"``.
            *args: Arguments of the pipeline.
            seed: 0 to 2**32 - 1; with several images the next ones count up from it, or one per
                image. ``None`` draws one.
            scheduler: Scheduler for this request: a class, a name that diffusers exports, or a
                sampler's name such as ``"DPM++ 2M Karras"``.
            lora_weights: LoRAs for this request: a name, ``{"name": ..., "scale": ...}``, or a
                list of either.
            textual_inversions: Textual inversions for this request: a name,
                ``{"name": ..., "token": ...}``, or a list of either.
            exclusive: Run alone, which makes the picture the same bit for bit whatever else is
                asked for at that time. It waits for all that run before it, and all others wait.
            timeout_s: Seconds, waiting included, after which the request is stopped; ``None``
                takes that of the :class:`EngineLimits`.
            return_workflow: Record the request, so that :meth:`replay` can repeat it.
            keep_size: Answer in the size of ``image``, which is padded to what the pipeline takes,
                and cropped; else the pipeline chooses.
            on_step: Called after each denoising step, in the thread of the request.
            **arguments: Arguments of the pipeline.

        Raises:
            InvalidRequest: 400, an argument is unknown or wrong.
            UntrustedSource: 400, an adapter from a source that is not allowed.
            AdapterNotFound: 404, no such adapter.
            QueueFull: 429, too many requests wait.
            RequestCancelled: 503, the engine is closed.
        """
        given = {
            **arguments,
            "seed": seed,
            "scheduler": scheduler,
            "lora_weights": lora_weights,
            "textual_inversions": textual_inversions,
            "exclusive": exclusive,
            "return_workflow": return_workflow,
            "keep_size": keep_size,
        }
        given |= {"timeout_s": timeout_s, "on_step": on_step}
        return self._submit(Ticket(), task, args, given)

    def replay(self, workflow: Workflow, /, *, strict: bool = True, **overrides: Any) -> Result:
        """Repeats a workflow and waits for it. See :meth:`submit_replay`."""
        return self.submit_replay(workflow, strict=strict, **overrides).result()

    async def areplay(self, workflow: Workflow, /, **arguments: Any) -> Result:
        """Repeats a workflow; cancelling the awaiting task cancels it. See :meth:`submit_replay`.

        Files are read and pictures decoded in a thread beside the event loop.
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

        The same pipeline, model, code and adapters must be here. Other versions or devices are no
        hindrance: :attr:`Result.replay` names them, and says whether the output is the same. It
        reads the files of adapters whose hash it does not know yet.

        Args:
            workflow: Of an earlier request, or of :func:`bentoml_diffusers.run_with_workflow`.
            strict: ``False`` runs it whatever differs, and only reports it.
            limits: Those of a service, for a stranger's workflow.
            **overrides: Arguments of :meth:`submit` to change, such as ``negative_prompt`` or
                ``seed``.

        Raises:
            WorkflowMismatch: 409, something else is here, and it is strict.
            InvalidWorkflow: 400, something in it cannot be.
            InvalidRequest: 400, an argument is unknown or wrong.
            AdapterNotFound: 404, no such adapter here, and it is strict.
            QueueFull: 429, too many requests wait.
            RequestCancelled: 503, the engine is closed.
            DeadlineExceeded: 504, the time was over before all was read.
        """
        ticket = Ticket()
        with self._admission.counting_refusals():
            self._set_timeout(ticket, overrides.get("timeout_s"))
            plan = self._planner.plan(workflow, overrides, ticket, strict=strict, limits=limits)
        return self._submit(ticket, plan.task, (), plan.given, plan)

    @property
    def is_ready(self) -> bool:
        """False once the engine is closed, or cannot schedule requests any more."""
        return not (self._admission.is_closed or self._worker.conductor.is_broken)

    def report(self) -> EngineReport:
        """Returns what the engine has done and does. Safe from any thread, at any time."""
        return EngineReport(
            running=self._admission.running,
            waiting=self._admission.waiting,
            counts=self._admission.counts,
            forwards=self._worker.conductor.forwards,
            seconds_per_row=self._worker.conductor.profile.table(),
            adapters=self._bank.report(),
        )

    def close(self, *, cancel: bool = False) -> None:
        """Stops the engine.

        Args:
            cancel: Stop running and waiting requests; else finish them first.
        """
        self._admission.close(cancel=cancel)
        self._bank.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=error is not None)

    def find_call(self, task: str) -> tuple[type[Any], str, Parameters]:
        """Returns class, method and parameters of a task.

        Raises:
            InvalidRequest: 400, the pipeline has no such task.
        """
        return self._resolver.find_call(task)

    def _submit(
        self,
        ticket: Ticket,
        task: str,
        args: tuple[Any, ...],
        given: dict[str, Any],
        plan: Plan | None = None,
    ) -> Handle:
        ticket.on_step = given.pop("on_step", None)
        with self._admission.counting_refusals():
            self._set_timeout(ticket, given.pop("timeout_s", None))
            entry = Entry(self._resolver.resolve(task, args, given, plan), ticket)
            self._admission.submit(entry)
        return Handle(entry.future, ticket, lambda: self._admission.withdraw(entry))

    def _set_timeout(self, ticket: Ticket, timeout_s: float | None) -> None:
        check_timeout(timeout_s)
        ticket.timeout_s = self.limits.timeout_s if timeout_s is None else timeout_s

    def _run(self, entry: Entry) -> Result:
        captured = self._recorder.begin(entry.request, entry.ticket)
        result = self._worker.run(entry)
        return self._recorder.finish(entry.request, captured, result)
