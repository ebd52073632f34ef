"""Writes the IP-Adapters that are loaded into a pipeline's UNet as files that load again.

diffusers cannot save them: a UNet that is saved with one no longer loads.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import make_image_projection
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import IP_ADAPTER_FOLDER, SCALES_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

# Names in diffusers' image projections -> names in files, as diffusers reads them.
_PROJECTIONS = {
    "ImageProjection": {"image_embeds.": "proj."},
    "IPAdapterFullImageProjection": {
        "ff.net.0.proj.": "proj.0.",
        "ff.net.2.": "proj.2.",
        "norm.": "proj.3.",
    },
    "IPAdapterPlusImageProjection": {".to_out.0.": ".to_out."},
    "IPAdapterFaceIDImageProjection": {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2."},
}


def has_ip_adapter(component: Any) -> bool:
    """True if an IP-Adapter is loaded into a component."""
    return any(_is_adapted(one) for one in getattr(component, "attn_processors", {}).values())


def refuse_ip_adapters(pipeline: str, components: Mapping[str, Any]) -> None:
    """Refuses IP-Adapters that cannot be stored: those in a component that is not a UNet.

    Raises:
        InvalidModel: 400, names the component.
    """
    for name, component in components.items():
        if name != "unet" and has_ip_adapter(component):
            raise InvalidModel(
                pipeline,
                f"has an IP-Adapter in its {name}, which cannot be stored",
                "unload_ip_adapter(), save, and load it again after load_model",
            )


def write_ip_adapters(unet: Any, folder: Path) -> None:
    """Writes the IP-Adapters of a UNet into ``ip_adapter/``, with their scales.

    Raises:
        InvalidModel: 400, of a kind that could not be restored exactly.
    """
    from safetensors.torch import save_file

    place = folder / IP_ADAPTER_FOLDER
    place.mkdir(parents=True)
    layers = unet.encoder_hid_proj.image_projection_layers
    for number, layer in enumerate(layers):
        projection = _projection_of(unet, layer)
        tensors = {f"image_proj.{key}": value for key, value in projection.items()}
        tensors.update(_attention_of(unet, number))
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            place / f"{number:02}.safetensors",
        )
    adapted = {key: one for key, one in unet.attn_processors.items() if _is_adapted(one)}
    scales = {key: list(one.scale) for key, one in adapted.items()}
    (place / SCALES_FILE).write_text(json.dumps(scales, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def without_ip_adapters(unet: Any) -> Iterator[None]:
    """Removes the IP-Adapters of a UNet for the block. Not thread-safe: nothing may run with it."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    unet.encoder_hid_proj = None  # first: it may have processors itself
    before = dict(unet.attn_processors)
    plain = {key: AttnProcessor2_0() if _is_adapted(one) else one for key, one in before.items()}
    try:
        unet.register_to_config(encoder_hid_dim_type=None)
        unet.set_attn_processor(plain)
        yield
    finally:
        unet.set_attn_processor(before)
        unet.encoder_hid_proj = projection
        unet.register_to_config(encoder_hid_dim_type=kind)


def _is_adapted(processor: Any) -> bool:
    return "IPAdapter" in type(processor).__name__


def _projection_of(unet: Any, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns an image projection as in files; checks that diffusers recreates it from them."""
    state = layer.state_dict()
    renamed = {
        _rename(key, _PROJECTIONS.get(type(layer).__name__, {})): state[key] for key in state
    }
    try:
        again = make_image_projection(unet, renamed)
    except (KeyError, ValueError, RuntimeError, TypeError) as err:
        raise _unknown(layer) from err
    if type(again) is not type(layer) or not _are_equal(again.state_dict(), state):
        raise _unknown(layer)
    return renamed


def _attention_of(unet: Any, number: int) -> dict[str, torch.Tensor]:
    adapted = [one for one in unet.attn_processors.values() if _is_adapted(one)]
    return {
        f"ip_adapter.{2 * index + 1}.{part}.weight": getattr(one, part)[number].weight
        for index, one in enumerate(adapted)
        for part in ("to_k_ip", "to_v_ip")
    }


def _rename(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old) or old.startswith("."):
            key = key.replace(old, new, 1)
    return key


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        bool((one[key].to(other[key]) == other[key]).all()) for key in one
    )


def _unknown(layer: object) -> InvalidModel:
    return InvalidModel(
        type(layer).__name__,
        "is the image projection of an IP-Adapter that cannot be stored",
        "unload_ip_adapter(), save, and load it again after load_model",
    )
