"""The service of ``bentoml diffusers serve TAG``; environment variables say which and how."""

import json
import os

from bentoml_diffusers._names import ACCESS_VARIABLE, EMBED_VARIABLE, JOBS_VARIABLE, TAG_VARIABLE
from bentoml_diffusers.options import EmbedOptions
from bentoml_diffusers.serving.access import AccessOptions, KeyOptions
from bentoml_diffusers.serving.options import JobOptions
from bentoml_diffusers.serving.service import service

_access = json.loads(os.environ.get(ACCESS_VARIABLE, "{}"))
_keys = _access.get("keys")
_jobs = os.environ.get(JOBS_VARIABLE)

svc = service(
    os.environ.get(TAG_VARIABLE, "demo:latest"),
    embed=EmbedOptions(**dict.fromkeys(os.environ.get(EMBED_VARIABLE, "").split(), True)),
    allowed_hosts=_access.get("allowed_hosts"),
    keys=None if _keys is None else KeyOptions(file=_keys),
    access=AccessOptions(cors_origins=_access.get("cors_origins", ())),
    jobs=None if _jobs is None else JobOptions(folder=_jobs),
)
