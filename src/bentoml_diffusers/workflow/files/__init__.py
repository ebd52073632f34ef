"""A workflow as data: its fields, and how it stands in a text, a zip, an image. Loads no torch."""

from bentoml_diffusers.workflow.files.blobs import KIND, encode_base64, name_of
from bentoml_diffusers.workflow.files.bounds import LOCAL, Bounds, count_marks
from bentoml_diffusers.workflow.files.containers import ImageFormat
from bentoml_diffusers.workflow.files.images import Embedding, embed_workflow, save_image
from bentoml_diffusers.workflow.files.infotext import make_infotext
from bentoml_diffusers.workflow.files.schema import (
    FORMAT,
    Adapter,
    Attached,
    Component,
    Environment,
    Generator,
    Guider,
    Output,
    OutputPart,
    Pipeline,
    Scheduler,
    StoredModel,
    Workflow,
)
from bentoml_diffusers.workflow.files.summary import summarize

__all__ = [
    "Adapter",
    "Attached",
    "Bounds",
    "Component",
    "Embedding",
    "Environment",
    "FORMAT",
    "Generator",
    "Guider",
    "KIND",
    "LOCAL",
    "Output",
    "OutputPart",
    "ImageFormat",
    "Pipeline",
    "Scheduler",
    "StoredModel",
    "Workflow",
    "count_marks",
    "embed_workflow",
    "encode_base64",
    "make_infotext",
    "name_of",
    "save_image",
    "summarize",
]
