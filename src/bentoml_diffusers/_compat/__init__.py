"""The only place that looks at versions, or into private corners, of other packages.

One module for each of them. Each entry says what will let us delete it, and has a test of what it
relies on in ``tests/test_compat.py``. Nothing here loads torch or diffusers before it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat.bentoml import (
    StoreAccess,
    alias_upstream_module,
    bound_host,
    find_origin_check,
    log_as_bentoml,
    model_store,
    parse_models_by_libyaml,
    quiet_refusals,
    read_payload,
    service_timeout_s,
    swagger_folder,
)
from bentoml_diffusers._compat.diffusers import (
    AUTO_TASKS,
    CHECKS,
    DECODER_INPUTS,
    DETERMINISTIC_DECODERS,
    attention_backend,
    describe_class,
    execution_device,
    find_task_class,
    fix_execution_device,
    has_repeated_blocks,
    is_offloaded,
    latent_unpacker,
    lora_components,
    lora_config,
    make_image_projection,
    missing_backends,
    optional_components,
    origin_of,
    progress_bar_options,
    quantization_of,
    reads_alpha_of_file,
    reads_lokr,
    signature_of,
    takes_attention_backend,
)
from bentoml_diffusers._compat.modular import (
    BLOCK_STATE,
    blocks_of,
    components_manager,
    copy_blocks,
    find_modular_class,
    workflow_map,
)
from bentoml_diffusers._compat.peft import (
    quiet_lora_loading,
    tuner_layer,
)
from bentoml_diffusers._compat.runners import (
    install_image_container,
    is_runner_process,
    keep_thread_counts,
    let_runner_calls_overlap,
    runner_timeout_s,
)
from bentoml_diffusers._compat.torch import (
    TREE_FUNCTIONS,
    compile_in_place,
    copy_tensors,
    count_writes,
    drop_hooks,
    is_compiled,
    unwrap_compiled,
)
from bentoml_diffusers._compat.transformers import (
    no_progress_bars,
    no_torchvision_notes,
    restore_text_model,
)
from bentoml_diffusers._compat.uvicorn import (
    bound_connections,
)
from bentoml_diffusers._compat.versions import (
    find_version,
    unmet_requirements,
)

if TYPE_CHECKING:
    from bentoml_diffusers._compat.torch import (
        TreeSpec,
        tree_flatten,
        tree_leaves,
        tree_map_only,
        tree_unflatten,
    )

__all__ = [
    "AUTO_TASKS",
    "BLOCK_STATE",
    "CHECKS",
    "DECODER_INPUTS",
    "DETERMINISTIC_DECODERS",
    "StoreAccess",
    "TreeSpec",
    "alias_upstream_module",
    "attention_backend",
    "blocks_of",
    "bound_connections",
    "bound_host",
    "compile_in_place",
    "components_manager",
    "copy_blocks",
    "copy_tensors",
    "count_writes",
    "describe_class",
    "drop_hooks",
    "execution_device",
    "find_modular_class",
    "find_origin_check",
    "find_task_class",
    "find_version",
    "fix_execution_device",
    "has_repeated_blocks",
    "install_image_container",
    "is_compiled",
    "is_offloaded",
    "is_runner_process",
    "keep_thread_counts",
    "let_runner_calls_overlap",
    "log_as_bentoml",
    "lora_components",
    "lora_config",
    "make_image_projection",
    "missing_backends",
    "model_store",
    "no_progress_bars",
    "no_torchvision_notes",
    "optional_components",
    "origin_of",
    "parse_models_by_libyaml",
    "progress_bar_options",
    "quantization_of",
    "quiet_lora_loading",
    "quiet_refusals",
    "read_payload",
    "reads_alpha_of_file",
    "reads_lokr",
    "restore_text_model",
    "runner_timeout_s",
    "service_timeout_s",
    "swagger_folder",
    "signature_of",
    "takes_attention_backend",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "tuner_layer",
    "unmet_requirements",
    "latent_unpacker",
    "unwrap_compiled",
    "workflow_map",
]


def __getattr__(name: str) -> Any:
    """Returns torch's own functions on trees, without anything in between."""
    if name not in TREE_FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bentoml_diffusers._compat import torch

    return getattr(torch, name)
