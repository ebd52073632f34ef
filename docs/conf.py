"""Sphinx configuration. It reads nothing from the network."""

import sys
from pathlib import Path

import bentoml_diffusers

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bentoml_diffusers"
author = "The bentoml-diffusers developers"
copyright = f"2026, {author}"
release = version = bentoml_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference_tables"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"bentoml_diffusers {release}"
