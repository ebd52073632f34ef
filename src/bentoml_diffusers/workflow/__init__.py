"""Records of calls that replay."""

from bentoml_diffusers.workflow.schema import Workflow

__all__ = ["Workflow"]
