"""The tasks of a modular pipeline: its modular workflows, as its blocks declare them.

diffusers calls a task of its blocks, such as ``text2image``, a *workflow*; here it is always a
*modular workflow*. The blocks name it, with the inputs that trigger it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import workflow_map
from bentoml_diffusers.tasks.inputs import Input, read_kind
from bentoml_diffusers.tasks.outputs import Output
from bentoml_diffusers.tasks.task import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers.modular_pipelines import ModularPipelineBlocks

# An argument of every call: which of its outputs it returns.
_OUTPUT = Input("output", "other")
# The output of a pipeline: the first of these that its blocks make.
_OUTPUTS = ("images", "videos", "audio", "audios")


def read_modular_workflows(blocks: ModularPipelineBlocks) -> dict[str, Task]:
    """Returns the modular workflows that blocks declare; empty for blocks with a single one."""
    known = {item.name for item in blocks.inputs if item.name}
    return {
        name: _read_workflow(name, blocks.get_workflow(name), _list_triggers(triggers), known)
        for name, triggers in workflow_map(blocks).items()
    }


def read_all_blocks(blocks: ModularPipelineBlocks) -> Task:
    """Returns all inputs of the blocks as one task named ``"__call__"``.

    Where blocks choose a path by the inputs that are present, only they know what is required.
    """
    has_choice = bool(workflow_map(blocks))
    inputs = {
        item.name: _read_input(item, _untyped_prompt(item), may_be_required=not has_choice)
        for item in blocks.inputs
        if item.name
    }
    return _make_task("__call__", blocks, inputs)


def _read_workflow(
    name: str, blocks: Any, alternatives: list[Mapping[str, Any]], known: set[str]
) -> Task:
    always = set.intersection(*map(set, alternatives))
    own = {item.name: item for item in blocks.inputs if item.name in known}
    fixed = {
        trigger: value
        for trigger, value in alternatives[0].items()
        if trigger in known and (value is not True or trigger not in own)
    }
    rest = tuple(frozenset(triggers) - always for triggers in alternatives)
    return _make_task(
        name,
        blocks,
        {key: _read_input(item, always) for key, item in own.items() if key not in fixed},
        alternatives=rest if all(rest) else (),
        fixed=fixed,
        components={
            spec.name: getattr(spec.type_hint, "__name__", "")
            for spec in blocks.expected_components
            if spec.default_creation_method == "from_pretrained"
        },
    )


def _make_task(name: str, blocks: Any, inputs: Mapping[str, Input], **more: Any) -> Task:
    from diffusers import ModularPipeline

    return Task(
        name=name,
        pipeline_class=ModularPipeline,
        method="__call__",
        inputs={**inputs, _OUTPUT.name: _OUTPUT},
        output=_find_output(blocks),
        is_modular=True,
        is_guided="guidance_scale" not in inputs and _is_guided(blocks),
        **more,
    )


def _list_triggers(triggers: Any) -> list[Mapping[str, Any]]:
    """Flattens triggers: a tuple lists alternatives for one modular workflow."""
    spellings = triggers if isinstance(triggers, tuple) else (triggers,)
    return [{name: value for name, value in one.items() if value} for one in spellings]


def _read_input(item: Any, triggers: set[str], *, may_be_required: bool = True) -> Input:
    required = (item.required or item.name in triggers) and item.default is None
    return Input(
        name=item.name,
        kind=read_kind(item.name, item.type_hint, item.default),
        default=item.default,
        is_required=required and may_be_required,
        description=" ".join((item.description or "").split()),
    )


def _untyped_prompt(item: Any) -> set[str]:
    """Makes the prompt required, which older blocks do not declare."""
    return {"prompt"} if item.type_hint is None else set()


def _find_output(blocks: Any) -> Output:
    names = [item.name for item in blocks.outputs]
    first = next((name for name in _OUTPUTS if name in names), "images")
    return Output(first)


def _is_guided(blocks: Any) -> bool:
    hints = [spec.type_hint for spec in blocks.expected_components if spec.name == "guider"]
    return any("guidance_scale" in inspect.signature(hint.__init__).parameters for hint in hints)
