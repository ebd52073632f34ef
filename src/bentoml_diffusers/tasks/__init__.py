"""Inputs and outputs of a pipeline's calls, and the options that are the engine's."""

from bentoml_diffusers.tasks.blocks import read_all_blocks, read_modular_workflows
from bentoml_diffusers.tasks.finder import (
    find_tasks,
    has_method,
    is_modular,
    list_classic_tasks,
    read_method,
)
from bentoml_diffusers.tasks.inputs import Input, Kind
from bentoml_diffusers.tasks.outputs import Output, OutputLayout, read_layout
from bentoml_diffusers.tasks.request_options import (
    ADAPTER_OPTIONS,
    OPTION_NAMES,
    OPTION_PLACES,
    RequestOptions,
    shows_options,
)
from bentoml_diffusers.tasks.signatures import read_task
from bentoml_diffusers.tasks.task import Task

__all__ = [
    "ADAPTER_OPTIONS",
    "OPTION_NAMES",
    "OPTION_PLACES",
    "Input",
    "Kind",
    "Output",
    "OutputLayout",
    "RequestOptions",
    "Task",
    "find_tasks",
    "has_method",
    "is_modular",
    "list_classic_tasks",
    "read_all_blocks",
    "read_layout",
    "read_method",
    "read_modular_workflows",
    "read_task",
    "shows_options",
]
