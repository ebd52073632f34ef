"""A service of a modular pipeline, whose blocks bring their own code."""

import os

import bentoml_diffusers

svc = bentoml_diffusers.service(
    "blocks",
    limits=bentoml_diffusers.RequestLimits(max_steps=60, max_side=64, max_pixels=64 * 48),
    trust_remote_code=os.environ.get("TRUST") == "yes",
)
