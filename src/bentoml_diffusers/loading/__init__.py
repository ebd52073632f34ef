"""Loads pipelines from stored models and options."""

from bentoml_diffusers.loading.mellon import mellon_config
from bentoml_diffusers.loading.modular import stored_blocks
from bentoml_diffusers.loading.pipeline import (
    bundled_pipeline_class,
    find_pipeline_class,
    load_pipeline,
    stored_options,
)
from bentoml_diffusers.loading.tuning import denoiser_names, running_pipeline

__all__ = [
    "bundled_pipeline_class",
    "denoiser_names",
    "find_pipeline_class",
    "load_pipeline",
    "mellon_config",
    "running_pipeline",
    "stored_blocks",
    "stored_options",
]
