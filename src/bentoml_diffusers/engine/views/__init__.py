"""A pipeline object for each request, over shared modules."""

from bentoml_diffusers.engine.views.exclusivity import exclusive_reason
from bentoml_diffusers.engine.views.view import Views

__all__ = [
    "Views",
    "exclusive_reason",
]
