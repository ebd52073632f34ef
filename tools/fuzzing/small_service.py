"""The demo model within narrow limits, so that thousands of requests take minutes."""

import bentoml_diffusers
from bentoml_diffusers import EmbedOptions, RequestLimits

svc = bentoml_diffusers.service(
    "demo",
    limits=RequestLimits(
        max_side=64, max_pixels=64 * 64, max_steps=3, default_steps=1, max_images=2
    ),
    embed=EmbedOptions(workflow=True),
)
