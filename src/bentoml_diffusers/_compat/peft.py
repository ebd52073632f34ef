"""Corners of PEFT."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any


@functools.cache
def tuner_layer() -> type[Any]:
    """Returns the class of the layers that PEFT puts around those of a model.

    Until PEFT (0.21) exports it at its top.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer  # type: ignore[no-any-return]


def quiet_lora_loading() -> None:
    """Silences what diffusers and PEFT say at every ordinary LoRA of a request.

    That it has no part for the text encoder (diffusers 0.42), and that there is more than one
    (PEFT 0.21). Until they say it at a lower level.
    """
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    logging.getLogger("diffusers.loaders.lora_base").addFilter(
        lambda record: "No LoRA keys associated to" not in record.getMessage()
    )
