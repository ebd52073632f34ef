"""Which pipelines cannot run two requests at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bentoml_diffusers._compat import is_offloaded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.guiders.guider_utils import BaseGuidance


@dataclass(frozen=True)
class Exclusivity:
    """The reason why requests run one at a time.

    Attributes:
        reason: Text for the log.
        calls_can_be_collected: ``False`` if even the modules must be called directly.
    """

    reason: str
    calls_can_be_collected: bool = True


def exclusive_reason(pipeline: DiffusionPipeline) -> Exclusivity | None:
    """Returns why requests of this pipeline cannot run side by side, or ``None``.

    A step cache keeps one state in the module, and each request that ends resets it. Offload hooks
    of a pipeline move modules at the end of a call, while others still use them. A guider that
    hooks into layers of the denoiser changes them for all requests.
    """
    for name, part in pipeline.components.items():
        if getattr(part, "is_cache_enabled", False):
            return Exclusivity(f"{name} has a step cache")
    if is_offloaded(pipeline):
        return Exclusivity("modules are offloaded", calls_can_be_collected=False)
    guider = getattr(pipeline, "guider", None)
    if guider is not None and _hooks_layers(guider):
        return Exclusivity(f"{type(guider).__name__} hooks into layers of the denoiser")
    return None


def _hooks_layers(guider: BaseGuidance) -> bool:
    from diffusers.guiders.guider_utils import BaseGuidance

    return type(guider).prepare_models is not BaseGuidance.prepare_models
