"""Workflows of an engine's requests: what a replay compares, and what a result returns."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.adapters import (
    file_key,
    find_static_adapters,
    hash_adapter,
    local_file,
)
from bentoml_diffusers.engine.once import Once
from bentoml_diffusers.engine.request import Recording, Ticket
from bentoml_diffusers.errors import DiffusersError
from bentoml_diffusers.store import hash_of_model, read_record
from bentoml_diffusers.store.adapter_files import describe_lora, read_adapter
from bentoml_diffusers.workflow.files import Adapter, Pipeline, StoredModel
from bentoml_diffusers.workflow.record import (
    capture,
    describe_guider,
    describe_pipeline,
    describe_scheduler,
    device_of,
    hash_output,
    read_environment,
)
from bentoml_diffusers.workflow.replay import report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import bentoml

    from bentoml_diffusers.adapters import Adapter as FoundAdapter
    from bentoml_diffusers.adapters import AdapterSet
    from bentoml_diffusers.engine.request import Plan, Request, Result
    from bentoml_diffusers.options import ModelOptions
    from bentoml_diffusers.tasks import RequestOptions
    from bentoml_diffusers.workflow.files import Workflow
    from bentoml_diffusers.workflow.record import Captured

# Options that change what is computed, not only where or how fast.
NUMERIC_OPTIONS = (
    *("torch_dtype", "variant", "enable_xformers", "enable_attention_slicing"),
    *("attention_backend", "enable_torch_compile", "enable_vae_slicing", "enable_vae_tiling"),
    *("channels_last", "quantization_config", "layerwise_casting", "step_cache", "offload"),
)


def make_recording(
    task: str, arguments: Mapping[str, Any], options: RequestOptions, plan: Plan | None
) -> Recording | None:
    """Returns what to record of a request; ``None`` if it asked for nothing.

    Args:
        task: As it was asked for.
        arguments: All arguments of the method.
        options: What it asks of the engine.
        plan: The replay that the request is.
    """
    if plan is None and not options.return_workflow:
        return None
    scheduler = options.scheduler if isinstance(options.scheduler, (str, type)) else None
    if scheduler is None and plan is not None and plan.workflow.scheduler is not None:
        scheduler = plan.workflow.scheduler.requested  # so that a replay can be replayed
    return Recording(
        task=task,
        arguments=arguments,
        scheduler=scheduler,
        returns_workflow=bool(options.return_workflow),
        keep_size=bool(options.keep_size),
        plan=plan,
    )


class Recorder:
    """Records requests of one engine. Safe from any thread.

    Args:
        pipeline: The engine's.
        options: The engine's.
        model: The stored model that the pipeline is from, if it is.
        in_turn: Calls a function while no request changes the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        options: ModelOptions,
        model: bentoml.Model | None,
        in_turn: Callable[[Callable[[], Pipeline]], Pipeline],
    ) -> None:
        self._pipeline = pipeline
        self._options = options
        self._model = model
        self._in_turn = in_turn
        # Looked for by a walk over all modules: not while a request may be changing them.
        self.device = device_of(pipeline)
        self._described = Once(self._describe)

    @property
    def pipeline(self) -> Pipeline:
        """The engine's pipeline. See :meth:`describe`."""
        return self.describe(Ticket())

    def describe(self, ticket: Ticket) -> Pipeline:
        """Returns the engine's pipeline; the first time takes long where files have no hash yet.

        Raises:
            InvalidModel: 400, the files of the model are not what was stored.
            RequestCancelled: 503, the request was cancelled while it waited.
            DeadlineExceeded: 504, its time is over.
        """
        return self._described.get(ticket)

    def _describe(self) -> Pipeline:
        found = self._in_turn(lambda: describe_pipeline(self._pipeline))
        given = self._options.to_dict()
        changes: dict[str, Any] = {
            "options": {name: given[name] for name in NUMERIC_OPTIONS if name in given},
            "static_adapters": _describe_static(self._options),
        }
        if self._model is not None:
            changes["model"] = _describe_model(self._model)
        return found.model_copy(update=changes)

    def begin(self, request: Request, ticket: Ticket) -> Captured | None:
        """Reads what a request is about to run with; ``None`` if nothing is to be recorded.

        Raises:
            InvalidModel: 400, the files of the model are not what was stored.
            RequestCancelled: 503, the request was cancelled while it waited for that.
            DeadlineExceeded: 504, its time is over.
        """
        recording = request.recording
        if recording is None or not recording.returns_workflow:
            return None
        self.describe(ticket)  # what can fail fails before the picture is painted
        return capture(recording.arguments)

    def finish(self, request: Request, captured: Captured | None, result: Result) -> Result:
        """Returns the result with its workflow, and with how the replay went."""
        recording = request.recording
        if recording is None:
            return result
        if captured is not None:
            workflow = self._make_workflow(request, recording, captured)
            output = hash_output(result.output)
            workflow = workflow.with_output(output, batched=result.was_batched)
            result = replace(result, workflow=workflow)
        plan = recording.plan
        if plan is not None:
            told = report(
                plan.workflow, result.output, plan.differences, is_changed=plan.is_changed
            )
            result = replace(result, replay=told)
        return result

    def _make_workflow(
        self, request: Request, recording: Recording, captured: Captured
    ) -> Workflow:
        scheduler = getattr(self._pipeline, "scheduler", None)
        if request.scheduler is not None and scheduler is not None:
            scheduler = request.scheduler.build(scheduler)
        guider = getattr(self._pipeline, "guider", None)
        ran = {"class_name": request.pipeline_class.__name__, "method": request.method}
        return captured.to_workflow(
            pipeline=self.pipeline.model_copy(update=ran),
            task=recording.task,
            seeds=list(request.seeds),
            scheduler=describe_scheduler(scheduler, recording.scheduler),
            guider=describe_guider(guider, guidance_scale=request.guidance_scale),
            adapters=describe_adapters(request.adapters),
            environment=read_environment(self.device),
            exclusive=request.exclusive,
            keep_size=recording.keep_size,
        )


def describe_adapters(found: AdapterSet, *, is_fused: bool = False) -> list[Adapter]:
    """Returns adapters with the hash of their files.

    Raises:
        InvalidModel: 400, a file that is gone.
    """
    return [
        *(_describe_adapter("lora", one, is_fused=is_fused) for one in found.loras),
        *(_describe_adapter("textual_inversion", one) for one in found.inversions),
    ]


def _describe_adapter(kind: Any, found: FoundAdapter, *, is_fused: bool = False) -> Adapter:
    name = Path(found.name).name if Path(found.name).is_absolute() else found.name
    return Adapter(
        kind=kind,
        name=name,
        tag=found.tag,
        scale=found.scale if isinstance(found.scale, float) else dict(found.scale),
        components=list(found.components),
        token=found.token,
        arguments={key: str(value) for key, value in found.arguments.items()},
        details=dict(_describe_rank(local_file(found), file_key(found))) if kind == "lora" else {},
        is_fused=is_fused,
        sha256=hash_adapter(found),
    )


@functools.lru_cache(maxsize=1024)
def _describe_rank(path: Path, _key: object) -> Mapping[str, Any]:
    """Reads a file that stays the same once: a large LoRA has thousands of names."""
    known = describe_lora(read_adapter(path))
    return {name: known[name] for name in ("rank", "alpha") if known.get(name) is not None}


def _describe_static(options: ModelOptions) -> list[Adapter]:
    """The static adapters; one that is no file of its own is seen on the pipeline itself."""
    try:
        return describe_adapters(
            find_static_adapters(options), is_fused=bool(options.fuse_static_loras)
        )
    except DiffusersError:
        return []


def _describe_model(model: bentoml.Model) -> StoredModel:
    record = read_record(Path(model.path))
    return StoredModel(
        tag=str(model.tag),
        tree_sha256=hash_of_model(model),
        origin=record.origin if record else None,
        commit=record.commit if record else None,
    )
