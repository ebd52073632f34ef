"""Restores the IP-Adapters that were loaded when a pipeline was stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel, UnsupportedByPipeline
from bentoml_diffusers.store import IP_ADAPTER_FOLDER, SCALES_FILE, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModularPipeline


def restore_ip_adapter(
    pipeline: DiffusionPipeline | ModularPipeline, folder: Path, name: str
) -> None:
    """Loads the stored IP-Adapters of a pipeline into its UNet, with their scales.

    Raises:
        InvalidModel: 400, files that do not fit the UNet.
        UnsupportedByPipeline: 400, the pipeline's class has no IP-Adapters.
    """
    if not hasattr(pipeline, "load_ip_adapter"):
        raise UnsupportedByPipeline(type(pipeline).__name__, "IP-Adapter")
    place = folder / IP_ADAPTER_FOLDER
    scales = read_json(place / SCALES_FILE, name)
    try:
        pipeline.load_ip_adapter(
            str(folder),
            subfolder=IP_ADAPTER_FOLDER,
            weight_name=sorted(path.name for path in place.glob("*.safetensors")),
            image_encoder_folder=None,  # it is a component, or there was none
            local_files_only=True,
        )
        for key, processor in pipeline.unet.attn_processors.items():
            if key in scales:
                processor.scale = list(scales[key])
    except (ValueError, KeyError, RuntimeError, OSError, TypeError) as err:
        raise InvalidModel(name, f"has an IP-Adapter that does not fit: {err}") from err
