"""The engine: one set of weights, any number of callers, one pipeline entry at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_diffusers import _names
from bentoml_diffusers.adapters import LoraSwitch, attach_static_adapters, request_finder
from bentoml_diffusers.engine.arguments import (
    bind_arguments,
    check_arguments,
    complete_size,
    invalid_request_from,
    with_rgb_images,
)
from bentoml_diffusers.engine.request import Handle, Request, Result, Ticket
from bentoml_diffusers.engine.seeds import choose_seeds
from bentoml_diffusers.engine.view import make_view
from bentoml_diffusers.errors import (
    DeviceOutOfMemory,
    DiffusersError,
    InvalidRequest,
    PipelineFailed,
    RequestCancelled,
)
from bentoml_diffusers.loading import load_pipeline, stored_options
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store import get

if TYPE_CHECKING:
    from types import TracebackType

    from bentoml import Tag
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests of many callers on one pipeline.

    Each request runs the ordinary ``__call__`` of its pipeline, on a view with its own scheduler
    over the shared weights. A single worker thread enters the pipeline, so a request that timed
    out or was cancelled never overlaps the next one. Safe to call from any number of threads.

    Args:
        pipeline: A diffusers pipeline; the engine owns it until :meth:`close`.
        options: Adapters and where requests may take theirs from.
    """

    def __init__(self, pipeline: DiffusionPipeline, options: ModelOptions | None = None) -> None:
        self.pipeline = pipeline
        self.options = options or ModelOptions()
        self._loras: LoraSwitch = attach_static_adapters(pipeline, self.options)
        self._finder = request_finder(self.options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diffusers-engine")
        self._open: dict[int, Handle] = {}
        self._closed = False

    @classmethod
    def from_model(
        cls,
        model: str | Tag | bentoml.Model | DiffusionPipeline,
        *,
        device: str | None = None,
        **options: Any,
    ) -> Engine:
        """Makes an engine from a stored model or from a pipeline.

        Args:
            model: A tag, a ``bentoml.Model``, or a diffusers pipeline.
            device: Where to run; ``None`` takes the GPU if there is one.
            **options: See :class:`bentoml_diffusers.ModelOptions`; they override what is stored
                with the model.

        Raises:
            ModelNotFound: 404, no such model.
            InvalidOption: 400, an unknown option or a wrong value.
            InvalidModel: 400, the model cannot be loaded.
        """
        given = ModelOptions.from_mapping(options)
        if not isinstance(model, (str, bentoml.Tag, bentoml.Model)):
            return cls(model, given)
        stored = model if isinstance(model, bentoml.Model) else get(model)
        merged = stored_options(stored).overridden_by(given)
        return cls(load_pipeline(stored, merged, device or default_device()), merged)

    def run(self, task: str, /, *args: Any, **arguments: Any) -> Result:
        """Runs a request and waits for it. See :meth:`submit`."""
        return self.submit(task, *args, **arguments).result()

    async def arun(self, task: str, /, *args: Any, **arguments: Any) -> Result:
        """Runs a request; cancelling the awaiting task cancels it. See :meth:`submit`."""
        handle = self.submit(task, *args, **arguments)
        try:
            return await asyncio.wrap_future(handle.future)
        except asyncio.CancelledError:
            handle.cancel()
            raise

    def submit(
        self,
        task: str,
        /,
        *args: Any,
        seed: int | list[int] | None = None,
        scheduler: str | type[Any] | None = None,
        lora_weights: Any = None,
        timeout_s: float | None = None,
        **arguments: Any,
    ) -> Handle:
        """Checks a request and queues it.

        Args:
            task: ``"txt2img"``, ``"img2img"``, ``"inpaint"``, or a method of the pipeline's
                class such as ``"__call__"``.
            *args: Arguments of the pipeline.
            seed: 0 to 2**32 - 1; with several images the next ones count up from it, or one per
                image. ``None`` draws one.
            scheduler: Scheduler for this request: a class, or a name that diffusers exports.
            lora_weights: LoRAs for this request: a name, ``{"name": ..., "scale": ...}``, or a
                list of either.
            timeout_s: Seconds, waiting included, after which the request is stopped.
            **arguments: Arguments of the pipeline.

        Raises:
            InvalidRequest: 400, an argument is unknown or wrong.
            UntrustedSource: 400, a LoRA from a source that is not allowed.
            AdapterNotFound: 404, no such LoRA.
            RequestCancelled: 503, the engine is closed.
        """
        if self._closed:
            raise RequestCancelled("the engine is closed")
        _check_timeout(timeout_s)
        request = self._resolve(task, args, arguments, seed, scheduler, lora_weights)
        ticket = Ticket(timeout_s)
        handle = Handle(self._worker.submit(self._work, request, ticket), ticket)
        self._open[id(handle)] = handle
        handle.future.add_done_callback(lambda _: self._open.pop(id(handle), None))
        return handle

    def close(self, *, cancel: bool = False) -> None:
        """Stops the engine.

        Args:
            cancel: Stop running and waiting requests; else finish them first.
        """
        self._closed = True
        if cancel:
            for handle in list(self._open.values()):
                handle.cancel()
        self._worker.shutdown(wait=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=error is not None)

    def _resolve(
        self,
        task: str,
        args: tuple[Any, ...],
        arguments: dict[str, Any],
        seed: int | list[int] | None,
        scheduler: str | type[Any] | None,
        lora_weights: Any,
    ) -> Request:
        cls, method_name = self._find_method(task)
        method = getattr(cls, method_name)
        bound = bind_arguments(method, args, arguments)
        scheduler_class = self._find_scheduler(scheduler)
        check_arguments(method, bound, getattr(self.pipeline, "scheduler", None))
        return Request(
            pipeline_class=cls,
            method=method_name,
            arguments=with_rgb_images(complete_size(self.pipeline, bound)),
            seeds=choose_seeds(method, seed, bound),
            scheduler_class=scheduler_class,
            loras=self._finder.find_all(lora_weights),
        )

    def _find_method(self, task: str) -> tuple[type[DiffusionPipeline], str]:
        own = type(self.pipeline)
        if task.startswith("_") and task != "__call__":
            raise InvalidRequest("task", task, "a task or a public method")
        if has_method(own, task):
            return own, task
        if task in _names.TASKS:
            return _names.task_class(self.pipeline, task), "__call__"
        raise InvalidRequest(
            "task", task, f"one of {', '.join(_names.TASKS)}, or a method of {own.__name__}"
        )

    def _find_scheduler(self, name: str | type[Any] | None) -> type[Any] | None:
        if name is None:
            return None
        try:
            cls = _names.resolve_scheduler_class(name)
        except DiffusersError as err:
            raise InvalidRequest("scheduler", name, "a scheduler that diffusers exports") from err
        current = self.pipeline.scheduler
        compatible = {*current.compatibles, type(current)}
        if cls not in compatible:
            names = ", ".join(sorted(one.__name__ for one in compatible))
            raise InvalidRequest("scheduler", name, f"one of {names}")
        return cls

    def _work(self, request: Request, ticket: Ticket) -> Result:
        started = time.monotonic()
        ticket.check()
        with self._loras.applied(request.loras):
            output = self._call(request, ticket)
        return Result(
            output=_to_tuple(output),
            seeds=tuple(request.seeds),
            steps=ticket.steps_done,
            queue_s=started - ticket.submitted,
            run_s=time.monotonic() - started,
        )

    def _call(self, request: Request, ticket: Ticket) -> Any:
        import torch

        name = request.pipeline_class.__name__
        arguments = dict(request.arguments)
        if request.seeds:
            # CPU generators give the same noise on every device.
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
            arguments["generator"] = generators if len(generators) > 1 else generators[0]
        view = make_view(self.pipeline, request, ticket)
        try:
            return getattr(view, request.method)(**arguments)
        except DiffusersError:
            raise
        except torch.OutOfMemoryError as err:
            raise DeviceOutOfMemory(name) from err
        except Exception as err:
            invalid = invalid_request_from(err)
            if invalid is not None:
                raise invalid from err
            logger.exception("%s failed", name)
            raise PipelineFailed(name, err) from err


def default_device() -> str:
    """Returns ``"cuda"``, ``"mps"`` or ``"cpu"``: the best that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_method(cls: type[Any], name: str) -> bool:
    """True if ``cls`` defines the method; every class seems to have ``__call__`` otherwise."""
    return any(name in vars(base) for base in cls.__mro__)


def _check_timeout(timeout_s: float | None) -> None:
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (is_number and timeout_s > 0):
        raise InvalidRequest("timeout_s", timeout_s, "a number of seconds above 0")


def _to_tuple(output: Any) -> tuple[Any, ...]:
    import torch
    from torch.utils._pytree import tree_map_only

    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    values = values if isinstance(values, tuple) else (values,)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), values)  # type: ignore[no-any-return]
