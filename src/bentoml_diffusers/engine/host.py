"""The engine as a host, which records and replays workflows."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.adapters import (
    file_key,
    find_static_adapters,
    hash_adapter,
    local_file,
)
from bentoml_diffusers.engine.once import Once
from bentoml_diffusers.engine.requests import Ticket
from bentoml_diffusers.errors import DiffusersError, InvalidRequest
from bentoml_diffusers.store import describe_lora, hash_of_model, read_adapter, read_record
from bentoml_diffusers.tasks import find_tasks, is_modular
from bentoml_diffusers.workflow.files import Adapter, Pipeline, StoredModel
from bentoml_diffusers.workflow.record import describe_pipeline, device_of
from bentoml_diffusers.workflow.replay import check_method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import bentoml

    from bentoml_diffusers.adapters import Adapter as FoundAdapter
    from bentoml_diffusers.adapters import AdapterBank, AdapterSet
    from bentoml_diffusers.options import ModelOptions
    from bentoml_diffusers.tasks.finder import Finder
    from bentoml_diffusers.workflow.files import Workflow

# Options that change the result, not only where or how fast it is computed.
NUMERIC_OPTIONS = (
    *("torch_dtype", "variant", "enable_xformers", "enable_attention_slicing"),
    *("attention_backend", "enable_torch_compile", "enable_vae_slicing", "enable_vae_tiling"),
    *("channels_last", "quantization_config", "layerwise_casting", "step_cache", "offload"),
)


class EngineHost:
    """Pipeline, model, tasks and adapters of one engine. Thread-safe.

    Args:
        pipeline: The engine's.
        options: The engine's.
        model: The stored model that the pipeline was loaded from, if any.
        tasks: The pipeline's.
        bank: The engine's adapters.
        in_turn: Calls a function while no request changes the pipeline.
    """

    rebuilds_guider = False  # requests share the pipeline's guider

    def __init__(
        self,
        pipeline: Any,
        options: ModelOptions,
        model: bentoml.Model | None,
        tasks: Finder,
        bank: AdapterBank,
        in_turn: Callable[[Callable[[], Pipeline]], Pipeline],
    ) -> None:
        self.pipeline = pipeline
        # Found by a walk over all modules, so not while a request may be changing them.
        self.device = device_of(pipeline)
        self.adapters = _Adapters(bank)
        self.find_task = tasks.find
        self._options = options
        self._model = model
        self._in_turn = in_turn
        self._described = Once(self._describe)
        self._ticket = Ticket()

    def within(self, ticket: Ticket) -> EngineHost:
        """Returns the host for one request, whose end also stops long computations."""
        host = copy.copy(self)
        host._ticket = ticket
        return host

    def describe(self) -> Pipeline:
        """Describes the engine's pipeline; slow the first time if files have no hash yet.

        Raises:
            InvalidModel: 400, the files of the model are not what was stored.
            RequestCancelled: 503, the request was cancelled while it waited.
            DeadlineExceeded: 504, its time is over.
        """
        return self._described.get(self._ticket)

    def name_task(self, workflow: Workflow) -> str:
        """Returns the name that this engine has for the task of a workflow.

        Raises:
            InvalidWorkflow: 400, not a method that generates.
        """
        recorded, own = workflow.pipeline, type(self.pipeline)
        is_own = recorded.class_name == own.__name__
        if is_own and is_modular(self.pipeline):
            return workflow.task or "__call__"
        if is_own:
            check_method(own, recorded.method)
        if is_own and recorded.method != "__call__":
            return recorded.method
        for task in (workflow.task, *_names.TASKS):
            if _class_of_task(self.pipeline, task) == recorded.class_name:
                return str(task)
        is_task = not is_own and workflow.task in _names.TASKS
        return str(workflow.task) if is_task else "__call__"

    def _describe(self) -> Pipeline:
        found = self._in_turn(lambda: describe_pipeline(self.pipeline))
        given = self._options.to_dict()
        changes: dict[str, Any] = {
            "options": {name: given[name] for name in NUMERIC_OPTIONS if name in given},
            "static_adapters": _describe_static(self._options),
        }
        if self._model is not None:
            changes["model"] = _describe_model(self._model)
        return found.model_copy(update=changes)


class _Adapters:
    """Finds the adapters that requests of an engine may name."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank

    def hash_adapter(self, option: str, item: Mapping[str, Any]) -> str:
        """Returns the sha256 of an adapter's file.

        Raises:
            AdapterNotFound: 404, no such adapter.
            InvalidRequest: 400, an adapter with scale 0.
        """
        asked: dict[str, Any] = {"lora_weights": None, option: [item]}
        found = self._bank.find(**asked)
        for one in (*found.loras, *found.inversions):
            return hash_adapter(one)
        raise InvalidRequest(f"{option}.scale", 0, "another number")


def _class_of_task(pipeline: Any, task: str | None) -> str | None:
    if task not in _names.TASKS or is_modular(pipeline):
        return None
    try:
        return find_tasks(pipeline).find(str(task)).pipeline_class.__name__
    except InvalidRequest:
        return None


def describe_adapters(found: AdapterSet, *, is_fused: bool = False) -> list[Adapter]:
    """Returns adapters with the hash of their files.

    Raises:
        InvalidModel: 400, a file that no longer exists.
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
    """Caches by content of the file: a large LoRA has thousands of names."""
    known = describe_lora(read_adapter(path))
    return {name: known[name] for name in ("rank", "alpha") if known.get(name) is not None}


def _describe_static(options: ModelOptions) -> list[Adapter]:
    """Describes static adapters; those that are not single files are found on the pipeline."""
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
