"""A service whose names and steps in OpenAI's form are its operator's."""

import bentoml_diffusers
from bentoml_diffusers import EngineLimits, OpenAIOptions, RequestLimits

svc = bentoml_diffusers.service(
    "demo",
    name="openai_service",
    limits=RequestLimits(default_steps=8, max_steps=1000),
    engine_limits=EngineLimits(max_running=1, max_queue=1),
    openai=OpenAIOptions(quality_steps={"low": 2}, model_aliases={"gpt-image-1": "demo"}),
)
