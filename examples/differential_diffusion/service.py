"""Differential diffusion over HTTP.

python write_repository.py build/differential_diffusion
bentoml diffusers import differential-diffusion build/differential_diffusion --trust-remote-code
bentoml serve service:svc
"""

import bentoml_diffusers

svc = bentoml_diffusers.service("differential-diffusion", name="differential_diffusion")
