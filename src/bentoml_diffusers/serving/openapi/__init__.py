"""The OpenAPI document of a service, and the page that shows it.

BentoML's own writes ``type: file`` and constructs of 3.1 under 3.0, and knows one answer of each
path; its page loads scripts of a foreign host.
"""

from bentoml_diffusers.serving.openapi.document import make_document
from bentoml_diffusers.serving.openapi.page import make_page_routes
from bentoml_diffusers.serving.openapi.schemas import Schemas

__all__ = ["Schemas", "make_document", "make_page_routes"]
