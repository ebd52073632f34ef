"""Which of several denoisers a LoRA is for: Wan 2.2 has two, and files do not name theirs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import lora_components
from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

_FIRST, _SECOND = "transformer", "transformer_2"


def check_components(pipeline: DiffusionPipeline, field: str, names: Sequence[str]) -> None:
    """Refuses components that cannot be chosen for a LoRA.

    Raises:
        InvalidRequest: 400, this pipeline offers no such choice.
    """
    loadable = lora_components(pipeline)
    known = [
        name
        for name in (_FIRST, _SECOND)
        if _SECOND in loadable and getattr(pipeline, name, None) is not None
    ]
    for name in names:
        if name not in known:
            kind = type(pipeline).__name__
            expected = (
                f"names from {', '.join(known)}"
                if known
                else f"none: files for a {kind} name their component"
            )
            raise InvalidRequest(field, name, expected)


def loader_arguments(component: str) -> dict[str, Any]:
    """Returns the arguments with which diffusers' ``load_lora_weights`` loads into a denoiser."""
    return {"load_into_transformer_2": True} if component == _SECOND else {}


def standing_for(pipeline: DiffusionPipeline, component: str) -> Any:
    """Returns a read-only pipeline whose first denoiser is the chosen one."""
    return SimpleNamespace(transformer=getattr(pipeline, component)) if component else pipeline
