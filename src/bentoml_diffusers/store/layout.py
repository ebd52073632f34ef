"""Names of files and folders inside a stored model, and the version of this format.

When the layout or ``record.json`` changes in a way that older code would misread, raise
``FORMAT_VERSION`` by one, say here what changed, teach :mod:`.record` to read all older
versions, and add a model of the old version to the tests.

Format 1: ``model.yaml`` (BentoML's), ``record.json`` (ours), ``diffusion_model/`` with a pipeline
as diffusers saves it, or ``adapter/`` with one safetensors file. Models of BentoML's own module
have no ``record.json`` and are read as format 0.
"""

from __future__ import annotations

MODULE_NAME = "bentoml_diffusers"
UPSTREAM_MODULE_NAMES = ("bentoml.diffusers", "bentoml._internal.frameworks.diffusers")
API_VERSION = "v1"
FORMAT_VERSION = 1

PIPELINE_FOLDER = "diffusion_model"
PIPELINE_INDEX = "model_index.json"
ADAPTER_FOLDER = "adapter"
RECORD_FILE = "record.json"
