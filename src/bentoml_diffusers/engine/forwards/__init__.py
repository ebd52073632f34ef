"""Calls of shared modules: collected, joined, run once, split."""

from bentoml_diffusers.engine.forwards.calls import Member, SharedModule, parameter_defaults
from bentoml_diffusers.engine.forwards.conductor import Conductor

__all__ = [
    "Conductor",
    "Member",
    "SharedModule",
    "parameter_defaults",
]
