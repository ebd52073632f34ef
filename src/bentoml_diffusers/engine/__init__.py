"""The engine: requests, their views of the pipeline, and shared forwards."""

from bentoml_diffusers.engine.devices import default_device
from bentoml_diffusers.engine.engine import Engine
from bentoml_diffusers.engine.host import NUMERIC_OPTIONS
from bentoml_diffusers.engine.payment import charge_now, expect_parts, payer
from bentoml_diffusers.engine.report import EngineReport
from bentoml_diffusers.engine.requests import Handle, Progress, Result

__all__ = [
    "NUMERIC_OPTIONS",
    "Engine",
    "EngineReport",
    "Handle",
    "Progress",
    "Result",
    "charge_now",
    "default_device",
    "expect_parts",
    "payer",
]
