"""OpenAI's images API: generations, edits, variations, and the list of models."""

from bentoml_diffusers.serving.dialects.context import Dialect
from bentoml_diffusers.serving.dialects.openai.document import describe_fields, describe_paths
from bentoml_diffusers.serving.dialects.openai.errors import error_response
from bentoml_diffusers.serving.dialects.openai.routes import make_routes

__all__ = ["DIALECT", "error_response"]

DIALECT = Dialect(make_routes, describe_paths, describe_fields)
