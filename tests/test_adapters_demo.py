"""What a person sees: with the demo model, an outline is only where it was asked for."""

import pytest
import torch
from adapter_models import generate, generate_alone, generate_together

from bentoml_diffusers import ModelOptions
from bentoml_diffusers.adapters import AdapterBank
from bentoml_diffusers.demo import LORAS, PIPELINE

CALL = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 4.0}
PROMPT = "a big red circle on a white background in the centre"
OUTLINE, STRIPES = LORAS["outline"].name, LORAS["stripes"].name
ASKED = [None, OUTLINE, {"name": OUTLINE, "scale": 0.6}, [STRIPES], None, [OUTLINE, STRIPES]]


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)


def redness(image):
    """How red the middle of the shape is: red minus green, from -1 to 1."""
    middle = image[26:38, 26:38]
    return float((middle[..., 0] - middle[..., 1]).mean())


def test_an_outline_is_only_where_it_was_asked_for(pipeline):
    bank = AdapterBank(pipeline, ModelOptions(lora_dir=str(LORAS["outline"].parent)))
    plain = generate(pipeline, seed=0, prompt=PROMPT, **CALL)[0]
    alone = [
        generate_alone(pipeline, bank, asked, seed=seed, prompt=PROMPT, **CALL)[0]
        for seed, asked in enumerate(ASKED)
    ]
    leases = [bank.acquire(bank.prepare(bank.find(asked))) for asked in ASKED]
    prompts = [PROMPT] * len(ASKED)
    together = generate_together(pipeline, bank, leases, range(len(ASKED)), prompts, **CALL)
    for one, other in zip(alone, together, strict=True):
        # Within one 8-bit level of the image that the request gets alone.
        assert (one - other).abs().max() < 1 / 255
    assert torch.equal(alone[0], plain)
    assert redness(together[0]) - redness(together[1]) > 0.2
    for lease in leases:
        lease.release()
    bank.close()
    assert torch.equal(generate(pipeline, seed=0, prompt=PROMPT, **CALL)[0], plain)
