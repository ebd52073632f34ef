"""LoRAs and textual inversions on a pipeline."""

from bentoml_diffusers.adapters.bank import AdapterBank, Lease
from bentoml_diffusers.adapters.files import file_key, hash_adapter, local_file
from bentoml_diffusers.adapters.lora import LoraSwitch, supports_lora
from bentoml_diffusers.adapters.records import AdapterReport, AdapterSet, PreparedAdapters
from bentoml_diffusers.adapters.sources import Adapter, AdapterFinder
from bentoml_diffusers.adapters.static import (
    attach_static_adapters,
    find_static_adapters,
    request_finder,
)

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterFinder",
    "AdapterReport",
    "AdapterSet",
    "Lease",
    "LoraSwitch",
    "PreparedAdapters",
    "attach_static_adapters",
    "file_key",
    "find_static_adapters",
    "hash_adapter",
    "local_file",
    "request_finder",
    "supports_lora",
]
