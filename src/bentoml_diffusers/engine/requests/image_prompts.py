"""IP-Adapters: whether a request may, or must, have an image for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

_FIELDS = ("ip_adapter_image", "ip_adapter_image_embeds")
_NEGATIVE = tuple(f"negative_{name}" for name in _FIELDS)  # of Flux
# Attributes of a denoiser with an IP-Adapter; SD3 has the second.
_LAYERS = ("encoder_hid_proj", "image_proj")


def check_ip_adapter(
    pipeline: DiffusionPipeline, defaults: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Checks that there is an image if the model has an IP-Adapter, and only then.

    Args:
        pipeline: The pipeline.
        defaults: Defaults of the method's parameters.
        arguments: Arguments of the call.

    Raises:
        InvalidRequest: 400, the image is missing, or nothing can use it.
    """
    if _FIELDS[0] not in defaults:
        return
    given = [name for name in _FIELDS if arguments.get(name) is not None]
    unet = getattr(pipeline, "unet", None)
    config = getattr(unet, "config", None)
    if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj" and not given:
        expected = "an image, or ip_adapter_image_embeds: the model was loaded with an IP-Adapter"
        raise InvalidRequest(_FIELDS[0], None, expected)
    denoisers = (unet, getattr(pipeline, "transformer", None))
    has_adapter = any(
        getattr(denoiser, name, None) is not None for denoiser in denoisers for name in _LAYERS
    )
    given += [name for name in _NEGATIVE if arguments.get(name) is not None]
    if given and not has_adapter:
        raise InvalidRequest(
            given[0], "an image", "None: the model was loaded without an IP-Adapter"
        )
