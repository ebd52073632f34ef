"""Names of files and folders inside a stored model, and the version of this format.

When the layout or ``record.json`` changes in a way that older code would misread, raise
``FORMAT_VERSION`` by one, describe the change here, teach :mod:`.record` to read all older
versions, and add a model of the old version to the tests.

Format 1: ``model.yaml`` (BentoML's), ``record.json`` (ours), ``diffusion_model/`` with a pipeline
as diffusers saves it, or ``adapter/`` with one safetensors file. Models of BentoML's own module
have no ``record.json`` and are read as format 0.

Format 2: ``record.json`` also has ``tree``, ``components``, ``code``, ``repairs`` and ``stamps``;
``files`` may lack large files whose hash is still being computed, these are in ``stamps``.
``code/`` holds the pipeline code that belongs to the model. ``diffusion_model/`` of a modular
pipeline has ``modular_model_index.json`` instead of ``model_index.json``; where its blocks were
put together without a class, ``blocks.json`` describes them. ``ip_adapter/`` holds IP-Adapters
that are loaded into a UNet. Code older than this format refuses such a model, as one without
index.
"""

from __future__ import annotations

MODULE_NAME = "bentoml_diffusers"
UPSTREAM_MODULE_NAMES = ("bentoml.diffusers", "bentoml._internal.frameworks.diffusers")
API_VERSION = "v1"
FORMAT_VERSION = 2

PIPELINE_FOLDER = "diffusion_model"
PIPELINE_INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
BLOCKS_CONFIG = "modular_config.json"  # diffusers' config of a folder with the code of blocks
BLOCKS_FILE = "blocks.json"
IP_ADAPTER_FOLDER = "ip_adapter"
SCALES_FILE = "scales.json"  # in that folder
ADAPTER_FOLDER = "adapter"
CODE_FOLDER = "code"
RECORD_FILE = "record.json"
