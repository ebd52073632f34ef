"""The smallest service: `bentoml serve service:svc` in this folder."""

import bentoml_diffusers

svc = bentoml_diffusers.service("demo:latest")
