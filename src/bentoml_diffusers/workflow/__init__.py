"""Records of calls that replay; importing it loads no torch, which :mod:`.plain` does."""

from bentoml_diffusers.workflow.comparing import ReplayReport
from bentoml_diffusers.workflow.schema import Workflow

__all__ = ["ReplayReport", "Workflow"]
