"""Converts LoRAs that PEFT's ``save_pretrained`` wrote to one file in the layout of diffusers.

PEFT writes a folder for each component: the tensors by the names of its layers, and a config
with their scaling. diffusers reads that from the metadata of its own files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_TEXT_ENCODER = "CLIPTextModel"
# The parts of a config about the tensors; the rest is about training.
_SETTINGS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "lora_bias"),
)
# Other initialisations change the base model, such as "pissa".
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def find_peft_parts(folder: Path) -> list[Path]:
    """Returns the folders that PEFT wrote: the given one, else its subfolders; empty if none."""
    if (folder / PEFT_CONFIG).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{PEFT_CONFIG}"))


def join_peft_parts(parts: list[Path], target: Path) -> None:
    """Writes the folders that PEFT wrote, one for each component, as one file.

    Args:
        parts: Folders that PEFT wrote. One named like a component is for that component.
        target: Path of the safetensors file.

    Raises:
        InvalidModel: 400, another method than LoRA, an unknown component, or tensors that are
            not part of a LoRA.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for part in parts:
        config, layers = _read_config(part), _read_layers(part)
        component = _component_of(part, config, layers)
        tensors.update({f"{component}.{key}": tensor for key, tensor in layers.items()})
        known = {key: config[key] for key in _SETTINGS if key in config}
        known["target_modules"] = sorted({key.partition(".lora_")[0] for key in layers})
        settings.update({f"{component}.{key}": value for key, value in known.items()})
    about = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_file(tensors, target, metadata={"format": "pt", **about})


def _read_config(part: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((part / PEFT_CONFIG).read_text())
    except (OSError, ValueError) as err:
        raise InvalidModel(part.name, f"has a broken {PEFT_CONFIG}") from err
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InvalidModel(
            part.name, f"is not a LoRA according to its {PEFT_CONFIG}", "import a LoRA"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise InvalidModel(
            part.name,
            f"was trained with init_lora_weights={start!r}, which changes the base model",
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    return config


def _read_layers(part: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(part / PEFT_TENSORS)
    except (OSError, SafetensorError) as err:
        raise InvalidModel(part.name, f"has no readable {PEFT_TENSORS}", "save it again") from err
    other = next((key for key in tensors if ".lora_" not in key), None)
    if other is not None or not tensors:
        raise InvalidModel(part.name, f"holds {other!r}, which is not a LoRA", "train a plain LoRA")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _component_of(part: Path, config: Mapping[str, Any], layers: Mapping[str, object]) -> str:
    """Returns the component: by the folder's name, else by the class or the layers."""
    if part.name in _COMPONENTS:
        return part.name
    base = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    keys = " ".join(layers)
    if "UNet" in base or "down_blocks." in keys or "up_blocks." in keys:
        return "unet"
    if "Transformer" in base or "transformer_blocks." in keys:
        return "transformer"
    if base == _TEXT_ENCODER:
        return "text_encoder"
    raise InvalidModel(
        part.name,
        "was written by save_pretrained of PEFT, and does not name its component",
        f"rename the folder to the component: {', '.join(_COMPONENTS)}",
    )
