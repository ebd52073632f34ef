"""LoRAs and textual inversions on a pipeline."""

from bentoml_diffusers.adapters.lora import LoraSwitch, supports_lora
from bentoml_diffusers.adapters.sources import Adapter, AdapterFinder
from bentoml_diffusers.adapters.static import attach_static_adapters, request_finder

__all__ = [
    "Adapter",
    "AdapterFinder",
    "LoraSwitch",
    "attach_static_adapters",
    "request_finder",
    "supports_lora",
]
