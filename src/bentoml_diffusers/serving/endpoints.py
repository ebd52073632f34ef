"""The endpoints of a service: what each of them generates, and what it takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel, ModelNotFound
from bentoml_diffusers.loading import find_pipeline_class, stored_blocks, stored_options
from bentoml_diffusers.loading.modular import is_modular
from bentoml_diffusers.media import has_codecs
from bentoml_diffusers.serving.codecs import FORMATS_BY_KIND
from bentoml_diffusers.serving.fields import why_left_out
from bentoml_diffusers.serving.schema import make_request_model
from bentoml_diffusers.store import (
    PIPELINE_FOLDER,
    get,
    has_ip_adapter,
    read_component_classes,
    read_record,
)
from bentoml_diffusers.tasks import (
    list_classic_tasks,
    read_all_blocks,
    read_modular_workflows,
    read_task,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bentoml

    from bentoml_diffusers.options import ModelOptions, RequestLimits
    from bentoml_diffusers.serving.reader import RequestModel
    from bentoml_diffusers.tasks import Task

logger = logging.getLogger(__name__)

# Of blocks that name no modular workflow.
_UNNAMED = "generate"
_ADAPTER_INPUT = "ip_adapter_image"
# Other paths and attributes of a service.
_RESERVED = (
    *("replay", "adapters", "capabilities", "models", "requests", "docs"),
    *("engine", "close_engine", "check_model", "bento_model"),
)


@dataclass(frozen=True)
class Endpoint:
    """One path of a service.

    Attributes:
        name: Its path, without the slash.
        task: What the engine is asked for.
        request: What it takes.
        description: For its page.
        kind: Of what it makes: ``"image"``, ``"video"`` or ``"audio"``.
    """

    name: str
    task: str
    request: type[RequestModel]
    description: str
    kind: str = "image"


def find_endpoints(tag: str, options: ModelOptions, limits: RequestLimits) -> tuple[Endpoint, ...]:
    """Returns the endpoints for a model: one for each task that it can be served for.

    No weights are loaded. A model that is not in the store yet is taken for a Stable Diffusion.

    Args:
        tag: The model.
        options: Options of the service; trust in the model's code is one.
        limits: Bounds of the requests.

    Raises:
        InvalidModel: 400, a pipeline that a service can serve nothing of; it says why.
        InvalidOption: 400, what a request gets that leaves a field out is beyond the limits.
        UntrustedSource: 400, code of the model that is not trusted.
    """
    try:
        model = get(tag)
    except ModelNotFound:
        return classic_endpoints(limits)
    record = read_record(Path(model.path))
    if record is not None and record.kind != "pipeline":
        return classic_endpoints(limits)  # refused, with the reason, before a worker starts
    merged = stored_options(model).overridden_by(options)
    if is_modular(Path(model.path_of(PIPELINE_FOLDER)), merged):
        tasks = _find_modular_tasks(model, merged)
    else:
        tasks = _find_classic_tasks(model, merged)
    return tuple(_make_endpoint(name, task, limits) for name, task in tasks.items())


def classic_endpoints(limits: RequestLimits, cls: type[Any] | None = None) -> tuple[Endpoint, ...]:
    """Returns the endpoints of a class of classic pipelines, by default of Stable Diffusion."""
    known = cls or _names.resolve_pipeline_class("StableDiffusionPipeline")
    found = {name: _without_adapter(task) for name, task in _list_named(known).items()}
    return tuple(_make_endpoint(name, task, limits) for name, task in found.items())


def _list_named(cls: type[Any]) -> dict[str, Task]:
    return {name: task for name, task in list_classic_tasks(cls).items() if name in _DESCRIPTIONS}


_DESCRIPTIONS = {
    "txt2img": "Generates an image from text",
    "img2img": "Generates an image from another one",
    "inpaint": "Generates what is white in a mask anew, in an image",
    "edit": "Changes an image as the prompt says",
    "upscale": "Generates a larger image from another one",
    "txt2video": "Generates a video from text",
    "img2video": "Generates a video from an image",
    "video2video": "Generates a video from another one",
    "txt2audio": "Generates sound from text",
    "audio2audio": "Generates sound from another one",
    "unconditional": "Generates from noise alone",
}


def _find_classic_tasks(model: bentoml.Model, options: ModelOptions) -> dict[str, Task]:
    cls = find_pipeline_class(model, options)
    found = _list_named(cls)
    if not has_ip_adapter(model):
        found = {name: _without_adapter(task) for name, task in found.items()}
    reasons = {name: _why_not_carried(task) for name, task in found.items()}
    served = {name: task for name, task in found.items() if not reasons[name]}
    if served:
        return served
    own = read_task("__call__", cls)
    told = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    reason = told or _why_not_carried(own) or f"none of {', '.join(_DESCRIPTIONS)} is what it does"
    raise InvalidModel(
        model.tag, f"is a {cls.__name__}, which no service can serve: {reason}; run it in Python"
    )


def _without_adapter(task: Task) -> Task:
    """Without an IP-Adapter in the model, its image would be refused."""
    inputs = {name: item for name, item in task.inputs.items() if _ADAPTER_INPUT not in name}
    return replace(task, inputs=inputs)


def _find_modular_tasks(model: bentoml.Model, options: ModelOptions) -> dict[str, Task]:
    if options.modular_workflow is not None:
        stored_blocks(model, options)  # refuses one that is not there
    blocks = stored_blocks(model, replace(options, modular_workflow=None))
    found = read_modular_workflows(blocks) or {_UNNAMED: read_all_blocks(blocks)}
    if options.modular_workflow is not None:
        found = {options.modular_workflow: found[options.modular_workflow]}
    present = read_component_classes(model)
    with_adapter = has_ip_adapter(model)
    is_cut = options.modular_workflow is not None
    reasons = {
        name: _why_not_served(task, present)
        or _why_not_with_adapter(task, with_adapter, is_cut=is_cut)
        for name, task in found.items()
    }
    for name, reason in reasons.items():
        if reason:
            logger.info("%s: no endpoint for %s: %s", model.tag, name, reason)
    for name in found:
        if name in _RESERVED or not name.isidentifier():
            raise InvalidModel(model.tag, f"has a modular workflow {name!r}: no name for a path")
    served = {name: task for name, task in found.items() if not reasons[name]}
    if not served:
        listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise InvalidModel(model.tag, f"has no modular workflow that can be served: {listed}")
    return served


def _why_not_served(task: Task, present: Mapping[str, str]) -> str:
    """Returns why a modular workflow has no endpoint; nothing if it can have one."""
    missing = task.list_missing(present)
    if missing:
        return f"needs {', '.join(missing)}, which the model lacks"
    return _why_not_carried(task)


def _why_not_carried(task: Task) -> str:
    """Returns why a task cannot be asked or answered over HTTP; nothing if it can."""
    if task.output.kind not in FORMATS_BY_KIND:
        return f"makes {task.output.name}, and services answer with images, video or audio"
    if task.output.kind != "image" and not has_codecs():
        return f"makes {task.output.name}: pip install 'bentoml-diffusers[video]'"
    lost = [item.name for item in task.inputs.values() if item.is_required and why_left_out(item)]
    return f"needs {', '.join(lost)}, which no request can carry" if lost else ""


def _why_not_with_adapter(task: Task, with_adapter: bool, *, is_cut: bool) -> str:
    """The same for IP-Adapters. Blocks that are cut down to a part load it only if they use it."""
    item = task.inputs.get(_ADAPTER_INPUT)
    if item is not None and item.is_required and not with_adapter:
        return "needs an IP-Adapter, which the model lacks"
    if item is None and with_adapter and not is_cut:
        return f"has no {_ADAPTER_INPUT}, which a model with an IP-Adapter needs"
    return ""


def _make_endpoint(name: str, task: Task, limits: RequestLimits) -> Endpoint:
    needed = [item.name for item in task.inputs.values() if item.is_required]
    made = {"image": "an image", "video": "a video", "audio": "sound"}[task.output.kind]
    from_inputs = f"Generates {made} from {', '.join(needed) or 'noise'}"
    text = _DESCRIPTIONS.get(name, from_inputs)
    return Endpoint(
        name,
        task.name,
        make_request_model(task, limits),
        f"{text}. The seed used is in the header `x-seed`.",
        task.output.kind,
    )
