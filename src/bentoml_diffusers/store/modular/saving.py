"""Writes a modular pipeline from memory into a folder, completely.

diffusers' ``save_pretrained`` leaves out guiders, code, structure and IP-Adapters, and writes
the path it saves to into the pipeline and its index.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers._compat import describe_class, unwrap_compiled
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import BLOCKS_FILE, MODULAR_INDEX
from bentoml_diffusers.store.modular.blocks import (
    code_of_blocks,
    complete_workflows,
    describe_blocks,
)
from bentoml_diffusers.store.modular.index import Component, write_index
from bentoml_diffusers.store.modular.ip_adapter import (
    has_ip_adapter,
    refuse_ip_adapters,
    without_ip_adapters,
    write_ip_adapters,
)

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModularPipeline

    from bentoml_diffusers.store.code import FoundCode


@dataclass(frozen=True)
class Prepared:
    """What is known about a modular pipeline before anything is written.

    Attributes:
        blocks: Its blocks as plain values.
        code: Their code, if they are not part of diffusers.
        components: The components that are written, by name.
        details: Details for the record.
    """

    blocks: dict[str, Any]
    code: FoundCode | None
    components: dict[str, Any]
    details: dict[str, Any]


def refuse_loras(pipeline: DiffusionPipeline | ModularPipeline) -> None:
    """Refuses a pipeline with LoRAs loaded: its layers would be saved under other names.

    Raises:
        InvalidModel: 400, names the LoRAs.
    """
    for name, component in pipeline.components.items():
        loras = list(getattr(component, "peft_config", None) or ())
        if loras:
            raise InvalidModel(
                type(pipeline).__name__,
                f"has LoRAs loaded into its {name}: {', '.join(loras)}",
                "unload_lora_weights() or fuse_lora() and unload, then save; import_lora stores "
                "a LoRA by itself",
            )


def prepare_modular(pipeline: ModularPipeline) -> Prepared:
    """Checks that a modular pipeline can be stored and restored exactly.

    Raises:
        InvalidModel: 400, names what cannot be stored, or is missing.
    """
    name = type(pipeline).__name__
    if not _names.is_modular_class(name):
        raise InvalidModel(
            name, "is a custom pipeline class, which cannot be stored", "move its code into blocks"
        )
    blocks = pipeline.blocks
    described = describe_blocks(blocks)
    code = code_of_blocks(blocks)
    from_files = {
        key: getattr(pipeline, key)
        for key in pipeline.pretrained_component_names
        if getattr(pipeline, key, None) is not None
    }
    workflows = complete_workflows(blocks, from_files, name)
    made = {key: getattr(pipeline, key) for key in pipeline.config_component_names}
    kept = {key: part for key, part in made.items() if _stands_in_index(part)}
    for key, component in {**from_files, **kept}.items():
        _check_component(name, key, component)
    return Prepared(
        described,
        code,
        {**from_files, **kept},
        {"blocks": type(blocks).__name__, "modular_workflows": workflows},
    )


def write_modular(prepared: Prepared, pipeline: ModularPipeline, folder: Path) -> None:
    """Writes a modular pipeline, without changing it.

    Args:
        prepared: See :func:`prepare_modular`.
        pipeline: The pipeline.
        folder: Target folder; created here.

    Raises:
        InvalidModel: 400, a component that cannot be written.
    """
    folder.mkdir(parents=True)
    index = {
        key: value
        for key, value in pipeline.config.items()
        if key not in pipeline.components and key != "_name_or_path"
    }
    index["_class_name"] = type(pipeline).__name__
    for name, component in prepared.components.items():
        _write_component(component, folder / name, folder)
        index[name] = Component(*describe_class(component)).localized(name)
    (folder / MODULAR_INDEX).write_text(write_index(index))
    _write_configs(pipeline, prepared, folder)
    if "sub_blocks" in prepared.blocks or (prepared.code and not prepared.code.class_name):
        (folder / BLOCKS_FILE).write_text(json.dumps(prepared.blocks, indent=2) + "\n")


def _stands_in_index(component: Any) -> bool:
    """True for what diffusers loads by its class; an image processor is made from a config."""
    return hasattr(component, "save_pretrained") and _names.is_component_class(
        *describe_class(component)
    )


def _check_component(pipeline: str, name: str, component: Any) -> None:
    library, class_name = describe_class(component)
    if not _names.is_component_class(library, class_name):
        raise InvalidModel(
            pipeline,
            f"has {library}.{class_name} as its {name}, "
            "which is not a class of diffusers or transformers",
            "let its blocks create it from a config",
        )
    if not hasattr(component, "save_pretrained"):
        raise InvalidModel(
            pipeline, f"has a {name} that cannot be saved: {class_name} has no save_pretrained"
        )
    refuse_ip_adapters(pipeline, {name: component})


def _write_component(component: Any, target: Path, root: Path) -> None:
    import torch

    component = unwrap_compiled(component)
    arguments = {"safe_serialization": True} if isinstance(component, torch.nn.Module) else {}
    if not has_ip_adapter(component):
        component.save_pretrained(target, **arguments)
        return
    write_ip_adapters(component, root)
    with without_ip_adapters(component):
        component.save_pretrained(target, **arguments)


def _write_configs(pipeline: ModularPipeline, prepared: Prepared, folder: Path) -> None:
    """Writes how components without files differ from those that diffusers makes by default."""
    for name in pipeline.config_component_names:
        component = getattr(pipeline, name)
        if name in prepared.components or not hasattr(component, "save_config"):
            continue
        spec = next(s for s in pipeline.blocks.expected_components if s.name == name)
        if type(component) is not spec.type_hint:
            raise InvalidModel(
                type(pipeline).__name__, f"has a {name} of another class than its blocks create"
            )
        if dict(component.config) != dict(spec.create().config):
            component.save_config(folder / name)
