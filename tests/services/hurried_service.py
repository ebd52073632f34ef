"""A service that gives each request eight seconds."""

import bentoml_diffusers

svc = bentoml_diffusers.service(
    "demo:latest",
    limits=bentoml_diffusers.RequestLimits(max_steps=900),
    service_options={"traffic": {"timeout": 8}},
)
