"""Options of a service that are not those of its model or its engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Mapping

# Steps by the `quality` of OpenAI's images API, as a share of those of a request that gives none.
STEP_SHARES: Mapping[str, float] = {
    "low": 0.5,
    "medium": 1.0,
    "standard": 1.0,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 3.0,
}


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions:
    """How a service speaks OpenAI's images API.

    Attributes:
        quality_steps: Denoising steps by ``quality`` of a request: ``{"low": 10, "high": 40}``. A
            quality that is not named gets a share of the steps of a request that gives none: 0.5
            for ``low``, 1 for ``medium`` and ``standard``, 1.5 for ``high`` and ``hd``, 2 for
            ``xhigh``, 3 for ``max``; never more than ``max_steps``.
        model_aliases: Other names that requests may give the model, or the model with LoRAs:
            ``{"gpt-image-1": "demo", "sketch": "demo:outline"}``. For clients whose names are
            fixed.
    """

    quality_steps: Mapping[str, int] = field(default_factory=dict)
    model_aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for quality, steps in self.quality_steps.items():
            if quality not in STEP_SHARES:
                raise InvalidOption("quality_steps", quality, f"one of {', '.join(STEP_SHARES)}")
            if type(steps) is not int or steps < 1:
                raise InvalidOption("quality_steps", steps, "an integer from 1")
        for pair in self.model_aliases.items():
            if not all(isinstance(name, str) and name for name in pair):
                raise InvalidOption("model_aliases", pair, "a name by a name")
