"""``POST /replay``: a workflow, which may be untrusted, as a request of a service.

What a client may not ask for directly it may not ask for in a workflow: the arguments of a
workflow are read by the request model of its task, and all others must have their defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, WithJsonSchema

from bentoml_diffusers import _names
from bentoml_diffusers.engine.requests import choose_scheduler
from bentoml_diffusers.errors import (
    DiffusersError,
    InvalidRequest,
    InvalidWorkflow,
    UnreadableRequest,
)
from bentoml_diffusers.serving.calls import Caller
from bentoml_diffusers.serving.choices import ANSWER_FIELDS, to_arguments
from bentoml_diffusers.serving.codecs import ALL_FORMATS, check_size, choose_format
from bentoml_diffusers.serving.faults import MAX_FAULTS
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.reader import RequestModel
from bentoml_diffusers.serving.sizes import check_whole_size
from bentoml_diffusers.tasks import OPTION_PLACES
from bentoml_diffusers.workflow import Workflow
from bentoml_diffusers.workflow.files import FORMAT, KIND, Bounds, encode_base64
from bentoml_diffusers.workflow.record import Decoder, Encoder, UnsupportedValue, describe_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bentoml_diffusers.engine import Engine, Result
    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.tasks import Input

_WORKFLOW = {
    "type": "file",
    "format": "binary",
    "title": "Workflow",
}


def make_replay_model(limits: RequestLimits) -> type[RequestModel]:
    """Returns the request of a replay under the limits of a service."""

    class Replay(RequestModel):
        flags: ClassVar[frozenset[str]] = frozenset({"strict"})

        workflow: Annotated[Workflow, WithJsonSchema(_WORKFLOW)] = Field(
            description="An image that holds a workflow, a zip, or JSON: a file, or base64; in "
            "JSON the workflow itself.",
        )
        overrides: dict[str, Any] = Field(
            default_factory=dict,
            description="Fields of the request that the workflow is of, with other values.",
            examples=[{"num_inference_steps": 30}],
        )
        strict: bool = Field(
            True,
            description="Refuse a workflow that was made with another model or other adapters.",
        )
        output_format: Literal[ALL_FORMATS] | None = Field(  # type: ignore[valid-type]
            None,
            description="Format of the answer, of the kind of the result; by default the first of "
            "the header Accept that is one, else png, mp4 or wav.",
            examples=["webp"],
        )

        @classmethod
        def _read_json(cls, body: bytes) -> dict[str, Any]:
            """A body that is a workflow means that and nothing else."""
            values = super()._read_json(body)
            return {"workflow": values} if values.get("format") == FORMAT else values

        @classmethod
        def _decode_file(cls, name: str, value: Any) -> Any:
            data = (
                json.dumps(value).encode()
                if isinstance(value, dict)
                else cls._read_file(name, value)
            )
            try:
                return Workflow.from_bytes(data, cls.limits)
            except InvalidWorkflow as err:
                raise cls._fault(err.field, str(err).removeprefix(f"{err.field}: ")) from err

    Replay.limits = limits
    Replay.multipart_fields = ["workflow"]  # BentoML knows images and paths only
    return Replay


@dataclass(frozen=True, kw_only=True)
class ReplayCall:
    """A workflow to repeat.

    Attributes:
        workflow: It, which may be untrusted.
        overrides: Fields of the request that it is of, as they came in.
        strict: Refuse what was made with something else than is here.
        output_format: Of the answer, checked before anything runs; ``None`` for any.
        request_id: By which its caller may cancel it.
        caller: Who asks.
    """

    workflow: Workflow
    overrides: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True
    output_format: str | None = None
    request_id: str = ""
    caller: Caller = field(default_factory=Caller)


async def run_replay(
    engine: Engine,
    requests: Mapping[str, type[RequestModel]],
    call: ReplayCall,
    *,
    records: bool,
) -> Result:
    """Repeats a workflow.

    Args:
        engine: That of the service.
        requests: What the service takes, by task.
        call: What to repeat.
        records: The result has a workflow of its own.
    """
    workflow = _with_task(engine, requests, call.workflow)
    choose_format(engine.find_task(str(workflow.task)).output.kind, call.output_format)
    overrides = await asyncio.to_thread(read_overrides, engine, requests, workflow, call.overrides)
    try:
        result: Result = await engine.areplay(
            workflow,
            strict=call.strict,
            limits=requests[str(workflow.task)].limits,
            return_workflow=records,
            on_step=process_metrics().count_steps("replay"),
            **call.caller.options,
            **to_arguments(overrides),
        )
    except DiffusersError as error:
        named = _named_by_client(error, overrides)
        raise named from (error if named is not error else error.__cause__)
    return result


def _named_by_client(error: DiffusersError, overrides: Mapping[str, Any]) -> DiffusersError:
    """The engine knows no overrides: it names the field that one has replaced."""
    field = getattr(error, "field", "")
    if field.partition(".")[0] not in overrides:
        return error
    named = copy.copy(error)
    named.field = f"overrides.{field}"
    named.say(f"overrides.{error}")
    return named


def read_overrides(
    engine: Engine,
    requests: Mapping[str, type[RequestModel]],
    workflow: Workflow,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Checks a workflow as a request of a service; reads the files of no adapter.

    Args:
        engine: That of the service.
        requests: What the service takes, by task.
        workflow: An untrusted one.
        overrides: Fields of that request, as they came in.

    Returns:
        The overrides as fields.

    Raises:
        InvalidWorkflow: 400, a task or argument that the service has not, or beyond its limits.
        UnreadableRequest: 400, overrides that it has not.
        InvalidRequest: 400, an override beyond its limits.
    """
    workflow = _with_task(engine, requests, workflow)
    model = requests[str(workflow.task)]
    overrides = {name: value for name, value in overrides.items() if value is not None}
    names = sorted(set(model.model_fields) - set(ANSWER_FIELDS))
    unknown = [name for name in overrides if name not in names]
    if unknown:
        raise UnreadableRequest(
            [
                ([f"overrides.{name}"], _unknown(name, names, workflow))
                for name in unknown[:MAX_FAULTS]
            ]
        )
    fields = {**dict(_read_fields(engine, model, workflow)), **overrides}
    try:
        for name in set(overrides) & set(model.multipart_fields):
            fields[name] = model._decode_file(name, overrides[name])
        request = model.model_validate(fields)
    except ValidationError as err:
        raise _first_fault(err, overrides) from err
    _check_size(engine, model, workflow, request)
    return {name: getattr(request, name) for name in overrides}


def _check_size(
    engine: Engine, model: type[RequestModel], workflow: Workflow, request: RequestModel
) -> None:
    """A workflow that gives no size makes what the model makes, not what the service would."""
    has_image = workflow.arguments.get("image") is not None
    given: dict[str, Any] = {"keep_size": workflow.keep_size and has_image}
    given |= {name: workflow.arguments.get(name) for name in ("height", "width")}
    given |= {name: getattr(request, name) for name in request.model_fields_set & set(given)}
    try:
        check_whole_size(engine, str(workflow.task), model.limits, given)
    except InvalidRequest as err:
        raise InvalidWorkflow.within(err, "workflow.arguments") from err


def _unknown(name: str, names: list[str], workflow: Workflow) -> str:
    near = _names.suggest_field(name, names)
    return f"expected a field of {workflow.task}{near}: {', '.join(names)}"


def _with_task(
    engine: Engine, requests: Mapping[str, type[RequestModel]], workflow: Workflow
) -> Workflow:
    """Returns the workflow with the name that its task has here.

    Raises:
        InvalidWorkflow: 400, none of those that are served.
    """
    recorded = workflow.pipeline
    calls = dict(_find_calls(engine, requests))
    same = [
        name
        for name, (cls, method) in calls.items()
        if (cls.__name__, method) == (recorded.class_name, recorded.method)
    ]
    task = workflow.task
    if task in (None, "__call__") and len(same) == 1:
        task = same[0]
    if task not in calls:
        known = f"one of {', '.join(calls)}" if calls else "a pipeline with a task of this service"
        raise InvalidWorkflow("workflow.task", task, known)
    cls, method = calls[task]
    if recorded.method != method:
        raise InvalidWorkflow("workflow.pipeline.method", recorded.method, repr(method))
    if task not in same and recorded.class_name in _class_names(engine):
        raise InvalidWorkflow("workflow.pipeline.class_name", recorded.class_name, cls.__name__)
    return workflow.model_copy(update={"task": task})


def _class_names(engine: Engine) -> list[str]:
    """Names of the classes that this pipeline has for any task, served or not."""
    return [cls.__name__ for _, (cls, _) in _find_calls(engine, _names.TASKS)]


def _find_calls(
    engine: Engine, tasks: Iterable[str]
) -> Iterator[tuple[str, tuple[type[Any], str]]]:
    """Yields class and method of each task that the pipeline can do."""
    for task in tasks:
        with contextlib.suppress(InvalidRequest):
            found = engine.find_task(task)
            yield task, (found.pipeline_class, found.method)


def _read_fields(
    engine: Engine, model: type[RequestModel], workflow: Workflow
) -> Iterator[tuple[str, Any]]:
    """Yields what a client would have to send for the same image."""
    task = engine.find_task(str(workflow.task))
    for name, value in workflow.arguments.items():
        field = f"workflow.arguments.{name}"
        if name in model.model_fields:
            is_left_out = value is None and None in (
                model.model_fields[name].default,
                task.default(name),
            )
            if not is_left_out:
                yield name, _decode(field, value, workflow, model.limits)
        elif not _is_encoded_default(value, task.inputs.get(name)):
            fields = ", ".join(model.model_fields)
            raise InvalidWorkflow(field, value, f"its default: a request can say only {fields}")
    guidance = workflow.guider.config.get("guidance_scale") if workflow.guider else None
    if guidance is not None and "guidance_scale" in model.model_fields:
        yield "guidance_scale", guidance
    yield from _read_choices(engine, workflow)


def _read_choices(engine: Engine, workflow: Workflow) -> Iterator[tuple[str, Any]]:
    if len(workflow.seeds) > 1:
        raise InvalidWorkflow("workflow.seeds", workflow.seeds, "one: a request is one image")
    yield from (("seed", seed) for seed in workflow.seeds)
    yield from _read_scheduler(engine, workflow)
    loras, inversions = [], []
    for index, one in enumerate(workflow.adapters):
        if one.arguments:
            field = f"workflow.adapters[{index}].arguments"
            raise InvalidWorkflow(field, one.arguments, "none: a request gives name and scale")
        if one.kind == "lora":
            loras.append({"name": one.name, "scale": one.scale, "components": one.components})
        else:
            inversions.append({"name": one.name, "token": one.token})
    if loras:
        yield "lora_weights", loras
    if inversions:
        yield "textual_inversions", inversions


def _read_scheduler(engine: Engine, workflow: Workflow) -> Iterator[tuple[str, Any]]:
    """A request names a scheduler; it has no say in its config."""
    recorded, base = workflow.scheduler, getattr(engine.pipeline, "scheduler", None)
    if recorded is None or base is None:
        return
    choice = choose_scheduler(recorded.requested, base)
    here = describe_scheduler(choice.build(base) if choice else base, recorded.requested)
    if recorded != here:
        name = repr(recorded.requested) if recorded.requested else "this model"
        raise InvalidWorkflow(
            "workflow.scheduler", recorded.class_name, f"class and config as {name} has them here"
        )
    if recorded.requested is not None:
        yield "scheduler", recorded.requested


def _decode(field: str, value: Any, workflow: Workflow, limits: RequestLimits) -> Any:
    """Decodes images and pairs; a tensor is sent as the file that its blob is.

    What else is not a plain value the request model refuses.
    """
    if isinstance(value, list):  # the frames of a video
        return [
            _decode(f"{field}[{index}]", item, workflow, limits) for index, item in enumerate(value)
        ]
    kind = value.get(KIND) if isinstance(value, dict) else None
    if kind == "tensor":
        return encode_base64(workflow.blobs.get(str(value.get("blob")), b""))
    if kind not in ("image", "tuple"):
        return value
    decoded = Decoder(workflow.blobs, bounds=Bounds.of(limits)).decode(value, field)
    if kind == "tuple":
        return list(decoded)
    try:
        check_size(decoded.size, limits)
    except ValueError as err:
        raise InvalidWorkflow(field, decoded.size, str(err)) from err
    return decoded


def _is_encoded_default(value: Any, item: Input | None) -> bool:
    try:
        return item is not None and value == Encoder().encode(item.default)
    except UnsupportedValue:
        return False


def _first_fault(error: ValidationError, overrides: Mapping[str, Any]) -> DiffusersError:
    """Names the place that the fault came from: in the workflow, or an override."""
    fault = error.errors(include_url=False)[0]
    path, got = [str(part) for part in fault["loc"]], fault["input"]
    expected = fault["msg"].removeprefix("Input should be ")
    if not path:  # the one thing that is said of two fields
        path = [next((side for side in _SIDES if side in overrides), _SIDES[0])]
        got = {side: got[side] for side in _SIDES if side in got}
    if path[0] in overrides:
        return InvalidRequest(".".join(["overrides", *path]), got, expected)
    place = OPTION_PLACES.get(path[0], ".".join(["arguments", *path]))
    return InvalidWorkflow(f"workflow.{place}", got, expected)


_SIDES = ("height", "width")
