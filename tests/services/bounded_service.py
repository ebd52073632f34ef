"""A service that waits for its clients a second, and has room for eight."""

import bentoml_diffusers
from bentoml_diffusers.serving.access import AccessOptions

svc = bentoml_diffusers.service(
    "demo",
    access=AccessOptions(
        receive_timeout_s=1, send_timeout_s=1, max_connections=8, metrics="closed"
    ),
)
