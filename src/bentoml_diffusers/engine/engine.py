"""The engine: one set of weights, any number of callers, shared forwards."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_diffusers import _names
from bentoml_diffusers._compat import compile_in_place
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.engine.admission import Admission, Entry
from bentoml_diffusers.engine.arguments import (
    Parameters,
    bind_arguments,
    check_arguments,
    check_clip_skip,
    check_number,
    count_pixel_steps,
    has_method,
    read_modular_parameters,
    read_parameters,
    with_rgb_images,
)
from bentoml_diffusers.engine.awaiting import submit_beside, tell, wait_for
from bentoml_diffusers.engine.devices import default_device
from bentoml_diffusers.engine.latents import fit_latents
from bentoml_diffusers.engine.modular import ModularTasks
from bentoml_diffusers.engine.prompts import find_sequence_length
from bentoml_diffusers.engine.recording import Recorder, make_recording
from bentoml_diffusers.engine.replaying import Planner
from bentoml_diffusers.engine.report import EngineReport
from bentoml_diffusers.engine.request import (
    OWN_ARGUMENTS,
    Handle,
    Plan,
    Progress,
    Request,
    Result,
    Ticket,
    check_timeout,
)
from bentoml_diffusers.engine.schedulers import choose_scheduler
from bentoml_diffusers.engine.seeds import choose_seeds
from bentoml_diffusers.engine.sizes import complete_size
from bentoml_diffusers.engine.worker import Worker
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.loading import load_pipeline, stored_options
from bentoml_diffusers.options import EngineLimits, ModelOptions
from bentoml_diffusers.store import get
from bentoml_diffusers.workflow.canvas import fit_to_image
from bentoml_diffusers.workflow.describing import is_modular

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

    from bentoml import Tag
    from diffusers import DiffusionPipeline

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
        self._modular = (
            ModularTasks(pipeline, self.options.modular_workflow) if is_modular(pipeline) else None
        )
        self._find_call: Callable[[str], _Call] = functools.cache(self._find_task)
        self._planner = Planner(
            pipeline, self._recorder, self._bank, lambda task: self._find_call(task)[2]
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
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | None] = asyncio.Queue()

        def notice(step: Progress) -> None:
            if not tell(loop, events.put_nowait, step):
                ticket.cancel()

        ticket = Ticket(on_step=notice)
        handle = self._submit(ticket, task, args, {**arguments, "preview_every": preview_every})
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
            timeout_s: Seconds, waiting included, after which the request is stopped.
            return_workflow: Record the request, so that :meth:`replay` can repeat it.
            keep_size: Answer in the size of ``image``, which is padded to what the pipeline takes,
                and cropped; else the pipeline chooses.
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
        check_timeout(timeout_s)
        return self._submit(Ticket(timeout_s), task, args, given)

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
        timeout_s = overrides.get("timeout_s")
        check_timeout(timeout_s)
        ticket = Ticket(timeout_s)
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
        return self._find_call(task)

    def _submit(
        self,
        ticket: Ticket,
        task: str,
        args: tuple[Any, ...],
        given: dict[str, Any],
        plan: Plan | None = None,
    ) -> Handle:
        if "timeout_s" in given:
            ticket.timeout_s = given.pop("timeout_s")
            check_timeout(ticket.timeout_s)
        entry = Entry(self._resolve(task, args, given, plan), ticket)
        self._admission.submit(entry)
        return Handle(entry.future, ticket, lambda: self._admission.withdraw(entry))

    def _run(self, entry: Entry) -> Result:
        captured = self._recorder.begin(entry.request, entry.ticket)
        result = self._worker.run(entry)
        return self._recorder.finish(entry.request, captured, result)

    def _resolve(
        self, task: str, args: tuple[Any, ...], given: dict[str, Any], plan: Plan | None
    ) -> Request:
        arguments = dict(given)
        own = {name: arguments.pop(name, None) for name in OWN_ARGUMENTS}
        cls, method, parameters = self._find_call(task)
        guidance_scale = arguments.pop("guidance_scale", None) if parameters.guided else None
        check_number("guidance_scale", guidance_scale)
        bound = bind_arguments(parameters, args, arguments)
        recording = make_recording(task, parameters.complete(bound), own, plan)
        if parameters.modular is not None:
            bound = parameters.modular.complete(bound)
        base = getattr(self.pipeline, "scheduler", None)
        check_arguments(parameters, bound, base)
        check_clip_skip(self.pipeline, bound)
        canvas = None
        if own["keep_size"]:
            bound, canvas = fit_to_image(self.pipeline, parameters.defaults, bound)
        bound = fit_latents(self.pipeline, bound)
        return Request(
            pipeline_class=cls,
            method=method,
            arguments=with_rgb_images(complete_size(self.pipeline, bound)),
            adapters=self._bank.find(own["lora_weights"], own["textual_inversions"], bound),
            seeds=choose_seeds(parameters, own["seed"], bound),
            scheduler=choose_scheduler(own["scheduler"], base),
            guidance_scale=guidance_scale,
            exclusive=bool(own["exclusive"]),
            pixel_steps=count_pixel_steps(self.pipeline, parameters, bound),
            preview_every=own["preview_every"] or 0,
            recording=recording,
            canvas=canvas,
            max_sequence_length=find_sequence_length(parameters.defaults, bound),
        )

    def _find_task(self, task: str) -> _Call:
        own = type(self.pipeline)
        if task.startswith("_") and task != "__call__":
            raise InvalidRequest("task", task, "a task or a public method")
        if self._modular is not None:
            workflow = self._modular.find(task)
            return own, "__call__", read_modular_parameters(self.pipeline, workflow)
        if has_method(own, task):
            return own, task, read_parameters(own, task)
        if task in _names.TASKS:
            cls = _names.task_class(self.pipeline, task)
            return cls, "__call__", read_parameters(cls, "__call__")
        raise InvalidRequest(
            "task", task, f"one of {', '.join(_names.TASKS)}, or a method of {own.__name__}"
        )


_Call = tuple[type[Any], str, Parameters]
