"""A service that gives each request four seconds."""

import bentoml_diffusers

svc = bentoml_diffusers.service("demo:latest", service_options={"traffic": {"timeout": 4}})
