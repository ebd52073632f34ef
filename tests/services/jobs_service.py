"""A service that takes jobs. `JOBS_FOLDER` says where it keeps them."""

import os

import bentoml_diffusers

svc = bentoml_diffusers.service(
    "demo:latest",
    jobs=bentoml_diffusers.JobOptions(folder=os.environ["JOBS_FOLDER"], lease_s=2, max_running=2),
)
