"""OpenAI's images API: generations, edits, variations, and the list of models."""

from bentoml_diffusers.serving.dialects.openai.errors import error_response
from bentoml_diffusers.serving.dialects.openai.routes import make_routes

__all__ = ["error_response", "make_routes"]
