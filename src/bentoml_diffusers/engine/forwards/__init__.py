"""Calls of shared modules: collected, joined, run once and split."""

from bentoml_diffusers.engine.forwards.calls import Member, SharedModule, parameter_defaults
from bentoml_diffusers.engine.forwards.conductor import Conductor
from bentoml_diffusers.engine.forwards.padding import texts_of

__all__ = [
    "Conductor",
    "Member",
    "SharedModule",
    "parameter_defaults",
    "texts_of",
]
