"""What a service hands on to its engine."""

import diffusers

from bentoml_diffusers import Engine, RequestLimits, testing
from bentoml_diffusers.serving.answering import _without_idle_defaults
from bentoml_diffusers.serving.endpoints import classic_endpoints


def test_a_default_that_a_pipeline_has_no_use_for_is_left_out():
    endpoint = next(one for one in classic_endpoints(RequestLimits()) if one.task == "inpaint")
    parts = testing.tiny_flux().components
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxFillPipeline(**{name: parts[name] for name in (*names, "transformer")})
    given = {"prompt": "a", "negative_prompt": "", "strength": 1.0, "seed": 3}
    with Engine.from_model(pipeline) as engine:
        kept = _without_idle_defaults(engine, endpoint, given)
        assert kept == {"prompt": "a", "strength": 1.0, "seed": 3}
        asked = {**given, "negative_prompt": "blurred"}
        assert _without_idle_defaults(engine, endpoint, asked) == asked
