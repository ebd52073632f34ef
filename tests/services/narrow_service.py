"""A service that runs one request and lets one wait."""

import bentoml_diffusers

svc = bentoml_diffusers.service(
    "demo:latest",
    engine_limits=bentoml_diffusers.EngineLimits(max_running=1, max_queue=1),
)
