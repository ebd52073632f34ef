"""Where BentoML's importer looks for ``bentoml.diffusers``: it becomes ``bentoml_diffusers``."""

import sys

import bentoml_diffusers

sys.modules[__name__] = bentoml_diffusers
