"""Requests, their views of the pipeline, and the queue in front of it."""

from bentoml_diffusers.engine.engine import Engine, default_device, has_method
from bentoml_diffusers.engine.request import Handle, Result

__all__ = ["Engine", "Handle", "Result", "default_device", "has_method"]
