"""From a workflow back to a call: what differs, what runs, and whether the output is the same.

Also adapts calls to their images: :mod:`.canvas` and :mod:`.images`.
"""

from bentoml_diffusers.workflow.replay.canvas import Canvas, fit_to_image
from bentoml_diffusers.workflow.replay.comparison import ReplayReport
from bentoml_diffusers.workflow.replay.components import check_method
from bentoml_diffusers.workflow.replay.images import join_outputs, split_by_image
from bentoml_diffusers.workflow.replay.limits import check_limits
from bentoml_diffusers.workflow.replay.plain import (
    populate_workflow_from_pipeline,
    replay,
    run_with_workflow,
)
from bentoml_diffusers.workflow.replay.plan import Plan, plan_replay

__all__ = [
    "Canvas",
    "Plan",
    "ReplayReport",
    "check_limits",
    "check_method",
    "fit_to_image",
    "join_outputs",
    "plan_replay",
    "populate_workflow_from_pipeline",
    "replay",
    "run_with_workflow",
    "split_by_image",
]
