"""A human-readable summary of a workflow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.workflow.files.blobs import KIND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.workflow.files.schema import Adapter, Output, Workflow

_HEX = 12  # characters of a hash that are shown
_PLUMBING = ("output_type", "return_dict", "callback_on_step_end_tensor_inputs")


def summarize(workflow: Workflow) -> list[tuple[str, str]]:
    """Returns the contents of a workflow as names and texts, without empty arguments.

    Control characters are escaped: the text may be untrusted, and go to a terminal.
    """
    pipeline, output = workflow.pipeline, workflow.output
    arguments = {
        name: value
        for name, value in workflow.arguments.items()
        if value is not None and name not in _PLUMBING
    }
    rows = [
        ("task", workflow.task or pipeline.method),
        ("pipeline", f"{pipeline.class_name}, {pipeline.kind}"),
        ("model", _describe_model(workflow)),
        *((name, _describe_value(value, workflow.blobs)) for name, value in arguments.items()),
        ("seeds", ", ".join(map(str, workflow.seeds))),
        ("generators", ", ".join(f"{one.seed} ({one.device})" for one in workflow.generators)),
        ("scheduler", _describe_scheduler(workflow)),
        ("guider", workflow.guider.class_name if workflow.guider else ""),
        *(("adapter", _describe_adapter(one)) for one in _adapters(workflow)),
        *(("left out", f"{name}: {what}") for name, what in workflow.unsupported.items()),
        ("size", "that of the input image" if workflow.keep_size else ""),
        ("ran", _describe_run(workflow)),
        ("made with", ", ".join(f"{a} {b}" for a, b in workflow.environment.versions.items())),
        ("output", _describe_output(output) if output else ""),
    ]
    return [(_printable(name), _printable(text)) for name, text in rows if text]


def _describe_model(workflow: Workflow) -> str:
    model = workflow.pipeline.model
    if model is None:
        return ""
    tree = f"files {model.tree_sha256[:_HEX]}" if model.tree_sha256 else None
    commit = f"commit {model.commit}" if model.commit else None
    return ", ".join(part for part in (model.tag, tree, model.origin, commit) if part)


def _describe_value(value: Any, blobs: Mapping[str, bytes]) -> str:
    if not isinstance(value, dict) or KIND not in value:
        return value if isinstance(value, str) else str(value)
    about = [str(value[KIND]), *(f"{value[key]}" for key in ("mode", "dtype") if key in value)]
    if isinstance(shape := value.get("size") or value.get("shape"), list):
        about.append(" x ".join(map(str, shape)))
    name = value.get("blob")
    if isinstance(name, str) and name in blobs:
        about.append(f"{len(blobs[name])} bytes, sha256 {name[:_HEX]}")
    return " ".join(about) if "blob" in value else str(value.get("items", " ".join(about)))


def _describe_scheduler(workflow: Workflow) -> str:
    scheduler = workflow.scheduler
    if scheduler is None:
        return ""
    sampler = _names.name_sampler(scheduler.class_name, scheduler.config)
    is_known = sampler != scheduler.class_name
    return f"{scheduler.class_name} ({sampler})" if is_known else scheduler.class_name


def _adapters(workflow: Workflow) -> list[Adapter]:
    return [*workflow.pipeline.static_adapters, *workflow.adapters]


def _describe_adapter(one: Adapter) -> str:
    scale = f"{one.scale:g}" if isinstance(one.scale, float) else json.dumps(one.scale)
    how = f"as {one.token}" if one.token else f"at {scale}"
    how += f" on {', '.join(one.components)}" if one.components else ""
    name = one.tag or one.name
    return f"{one.kind} {name} {how}, sha256 {one.sha256[:_HEX]}"


def _describe_run(workflow: Workflow) -> str:
    device = workflow.environment.hardware.get("gpu") or workflow.environment.hardware.get("device")
    how = (
        "alone, as requested"
        if workflow.exclusive
        else "in a batch"
        if workflow.batched
        else "alone"
    )
    return f"{how}, on {device}" if device else how


def _describe_output(output: Output) -> str:
    n_parts = len(output.parts)
    return f"{n_parts} {'part' if n_parts == 1 else 'parts'}, sha256 {output.sha256}"


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
