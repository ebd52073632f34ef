"""Modular pipelines: their index, blocks and IP-Adapters, opened and saved."""

from bentoml_diffusers.store.modular.blocks import complete_workflows, expected_names, read_blocks
from bentoml_diffusers.store.modular.folder import open_as_modular, open_modular
from bentoml_diffusers.store.modular.hub import ModularDownload, download_modular
from bentoml_diffusers.store.modular.index import (
    modular_index_from,
    read_modular_components,
    read_modular_index,
)
from bentoml_diffusers.store.modular.ip_adapter import (
    has_ip_adapter,
    refuse_ip_adapters,
    without_ip_adapters,
    write_ip_adapters,
)
from bentoml_diffusers.store.modular.saving import prepare_modular, refuse_loras, write_modular

__all__ = [
    "ModularDownload",
    "complete_workflows",
    "download_modular",
    "expected_names",
    "has_ip_adapter",
    "modular_index_from",
    "open_as_modular",
    "open_modular",
    "prepare_modular",
    "read_blocks",
    "read_modular_components",
    "read_modular_index",
    "refuse_ip_adapters",
    "refuse_loras",
    "without_ip_adapters",
    "write_ip_adapters",
    "write_modular",
]
