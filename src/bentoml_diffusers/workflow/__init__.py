"""Records of calls that replay."""

from bentoml_diffusers.workflow.comparing import ReplayReport
from bentoml_diffusers.workflow.plain import (
    populate_workflow_from_pipeline,
    replay,
    run_with_workflow,
)
from bentoml_diffusers.workflow.schema import Workflow

__all__ = [
    "ReplayReport",
    "Workflow",
    "populate_workflow_from_pipeline",
    "replay",
    "run_with_workflow",
]
