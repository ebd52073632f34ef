"""The endpoints of a service: what each of them paints, and what it takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel, ModelNotFound
from bentoml_diffusers.loading import stored_blocks, stored_options
from bentoml_diffusers.loading.modular import is_modular
from bentoml_diffusers.serving.modular import make_modular_model, why_left_out
from bentoml_diffusers.serving.schema import (
    make_img2img_model,
    make_inpaint_model,
    make_txt2img_model,
)
from bentoml_diffusers.store import get
from bentoml_diffusers.store.layout import IP_ADAPTER_FOLDER, MODULAR_INDEX, PIPELINE_FOLDER
from bentoml_diffusers.store.modular_index import (
    modular_index_from,
    read_modular_components,
    read_modular_index,
)
from bentoml_diffusers.store.source import read_index
from bentoml_diffusers.tasks import read_all_blocks, read_modular_workflows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import bentoml

    from bentoml_diffusers.options import ModelOptions, RequestLimits
    from bentoml_diffusers.serving.reading import RequestModel
    from bentoml_diffusers.tasks import Task

logger = logging.getLogger(__name__)

# Of blocks that name no modular workflow.
_UNNAMED = "paint"
_ADAPTER_INPUT = "ip_adapter_image"
# Other paths and attributes of a service.
_RESERVED = ("replay", "adapters", "engine", "close_engine", "check_model", "bento_model")


@dataclass(frozen=True)
class Endpoint:
    """One path of a service.

    Attributes:
        name: Its path, without the slash.
        task: What the engine is asked for.
        request: What it takes.
        description: For its page.
    """

    name: str
    task: str
    request: type[RequestModel]
    description: str


def find_endpoints(tag: str, options: ModelOptions, limits: RequestLimits) -> tuple[Endpoint, ...]:
    """Returns the endpoints for a model: of a modular pipeline one for each modular workflow.

    No weights are loaded. A model that is not in the store yet is taken for a classic pipeline.

    Args:
        tag: The model.
        options: Options of the service; trust in the code of blocks is one.
        limits: Bounds of the requests.

    Raises:
        InvalidModel: 400, blocks that paint no picture.
        UntrustedSource: 400, the code of the blocks is not trusted.
    """
    try:
        model = get(tag)
    except ModelNotFound:
        return classic_endpoints(limits)
    merged = stored_options(model).overridden_by(options)
    if not is_modular(Path(model.path_of(PIPELINE_FOLDER)), merged):
        return classic_endpoints(limits)
    return _modular_endpoints(model, merged, limits)


def classic_endpoints(limits: RequestLimits) -> tuple[Endpoint, ...]:
    """Returns the endpoints of a classic pipeline. A task that it cannot do is refused later."""
    return tuple(
        Endpoint(task, task, make(limits), f"{text}. The seed used is in the header `x-seed`.")
        for task, (make, text) in _CLASSIC.items()
    )


_CLASSIC: dict[str, tuple[Callable[[RequestLimits], type[RequestModel]], str]] = {
    "txt2img": (make_txt2img_model, "Paints a picture from text"),
    "img2img": (make_img2img_model, "Paints a picture over another one"),
    "inpaint": (make_inpaint_model, "Paints what is white in a mask anew, in a picture"),
}


def _modular_endpoints(
    model: bentoml.Model, options: ModelOptions, limits: RequestLimits
) -> tuple[Endpoint, ...]:
    if options.modular_workflow is not None:
        stored_blocks(model, options)  # refuses one that is not there
    blocks = stored_blocks(model, replace(options, modular_workflow=None))
    found = read_modular_workflows(blocks) or {_UNNAMED: read_all_blocks(blocks)}
    if options.modular_workflow is not None:
        found = {options.modular_workflow: found[options.modular_workflow]}
    folder = Path(model.path_of(PIPELINE_FOLDER))
    present = _stored_components(folder, str(model.tag))
    with_adapter = (folder / IP_ADAPTER_FOLDER).is_dir()
    reasons = {
        name: _why_not_served(workflow, present)
        or _why_not_with_adapter(
            workflow, with_adapter, is_cut=options.modular_workflow is not None
        )
        for name, workflow in found.items()
    }
    for name, reason in reasons.items():
        if reason:
            logger.info("%s: no endpoint for %s: %s", model.tag, name, reason)
    for name in found:
        if name in _RESERVED or not name.isidentifier():
            raise InvalidModel(model.tag, f"has a modular workflow {name!r}: no name for a path")
    served = [name for name, reason in reasons.items() if not reason]
    if not served:
        listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise InvalidModel(model.tag, f"has no modular workflow that can be served: {listed}")
    return tuple(_make_endpoint(name, found[name], limits) for name in served)


def _stored_components(folder: Path, name: str) -> dict[str, str]:
    """Returns the class of each component by its name."""
    if (folder / MODULAR_INDEX).is_file():
        index = read_modular_index(folder, name)
    else:
        index = modular_index_from(read_index(folder, name), name)
    found = read_modular_components(index, name)
    return {key: component.class_name for key, component in found.items()}


def _why_not_served(workflow: Task, present: Mapping[str, str]) -> str:
    """Returns why a modular workflow has no endpoint; nothing if it can have one."""
    missing = workflow.list_missing(present)
    if missing:
        return f"needs {', '.join(missing)}, which the model lacks"
    if workflow.output.kind != "image":
        return f"makes {workflow.output.name}, and services answer with a picture"
    lost = [
        item.name for item in workflow.inputs.values() if item.is_required and why_left_out(item)
    ]
    return f"needs {', '.join(lost)}, which no request can carry" if lost else ""


def _why_not_with_adapter(workflow: Task, with_adapter: bool, *, is_cut: bool) -> str:
    """The same for IP-Adapters. Blocks that are cut down to a part load it only if they use it."""
    item = workflow.inputs.get(_ADAPTER_INPUT)
    if item is not None and item.is_required and not with_adapter:
        return "needs an IP-Adapter, which the model lacks"
    if item is None and with_adapter and not is_cut:
        return f"has no {_ADAPTER_INPUT}, which a model with an IP-Adapter needs"
    return ""


def _make_endpoint(name: str, workflow: Task, limits: RequestLimits) -> Endpoint:
    needed = [item.name for item in workflow.inputs.values() if item.is_required]
    return Endpoint(
        name,
        workflow.name,
        make_modular_model(workflow, limits),
        f"Paints a picture from {', '.join(needed) or 'noise'}. "
        "The seed used is in the header `x-seed`.",
    )
