"""The service of ``bentoml diffusers serve TAG``; environment variables say which and how."""

import os

from bentoml_diffusers._names import EMBED_VARIABLE, TAG_VARIABLE
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.serving.service import service

svc = service(
    os.environ.get(TAG_VARIABLE, "demo:latest"),
    embed=EmbedOptions(**dict.fromkeys(os.environ.get(EMBED_VARIABLE, "").split(), True)),
)
