"""From a workflow back to a call: what differs here, what runs, and whether it is the same.

Also what shapes any call by its images: :mod:`.canvas` and :mod:`.images`.
"""

from bentoml_diffusers.workflow.replay.canvas import Canvas, fit_to_image
from bentoml_diffusers.workflow.replay.comparison import (
    Difference,
    ReplayReport,
    check_differences,
    compare,
)
from bentoml_diffusers.workflow.replay.components import (
    check_method,
    check_workflow,
    find_scheduler,
)
from bentoml_diffusers.workflow.replay.images import join_outputs, split_by_image
from bentoml_diffusers.workflow.replay.limits import check_limits
from bentoml_diffusers.workflow.replay.plain import (
    populate_workflow_from_pipeline,
    replay,
    report,
    run_with_workflow,
)

__all__ = [
    "Canvas",
    "Difference",
    "ReplayReport",
    "check_differences",
    "check_limits",
    "check_method",
    "check_workflow",
    "compare",
    "find_scheduler",
    "fit_to_image",
    "join_outputs",
    "populate_workflow_from_pipeline",
    "replay",
    "report",
    "run_with_workflow",
    "split_by_image",
]
