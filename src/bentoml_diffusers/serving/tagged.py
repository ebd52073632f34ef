"""The service of ``bentoml diffusers serve TAG``; the tag comes in an environment variable."""

import os

from bentoml_diffusers._names import TAG_VARIABLE
from bentoml_diffusers.serving.service import service

svc = service(os.environ.get(TAG_VARIABLE, "demo:latest"))
