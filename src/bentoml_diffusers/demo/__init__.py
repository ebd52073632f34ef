"""The bundled demo model: a small Stable Diffusion that generates coloured shapes.

It is trained for this package, generates 64 x 64 pixels in about a second on a CPU, and knows two
LoRAs and one textual inversion. See ``README.md`` beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import bentoml

_HERE = Path(__file__).parent

PIPELINE = _HERE / "pipeline"
LORAS = {name: _HERE / "loras" / f"{name}.safetensors" for name in ("outline", "stripes")}
TEXTUAL_INVERSIONS = {"teal": _HERE / "embeddings" / "teal.safetensors"}
TOKEN = "<teal>"  # noqa: S105 - a word of the prompt

MODEL_NAME = "demo"
PROMPTS = (
    "a big red circle on a blue background at the left",
    "a small yellow star on a black background in the centre",
    "a big green triangle on a white background at the right",
    "a big purple square on a orange background in the centre",
)


def import_demo_models() -> dict[str, bentoml.Model]:
    """Imports the demo model, its LoRAs and its textual inversion into the model store.

    Doing it again returns what is stored.

    Returns:
        The stored models ``demo``, ``outline``, ``stripes`` and ``teal``, by name.
    """
    from bentoml_diffusers.store import import_lora, import_model, import_textual_inversion

    models = {MODEL_NAME: import_model(MODEL_NAME, PIPELINE, signatures=_SIGNATURES)}
    models |= {name: import_lora(name, path) for name, path in LORAS.items()}
    models |= {
        name: import_textual_inversion(name, path, token=TOKEN)
        for name, path in TEXTUAL_INVERSIONS.items()
    }
    return models


# The methods of `custom_pipeline="stable_diffusion_mega"`; without it a runner has `__call__`,
# and the tasks `img2img` and `inpaint`.
_SIGNATURES = {
    method: {"batchable": False} for method in ("__call__", "text2img", "img2img", "inpaint")
}
