"""What the clients talk to: the demo model, with so short a queue that they must come again."""

import bentoml_diffusers
from bentoml_diffusers import EngineLimits, RequestLimits

svc = bentoml_diffusers.service(
    "demo",
    limits=RequestLimits(default_steps=6),
    engine_limits=EngineLimits(max_running=1, max_queue=1),
)
