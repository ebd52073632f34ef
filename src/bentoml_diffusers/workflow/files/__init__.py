"""A workflow as data: its fields, and its form in JSON, zips and images. Does not load torch."""

from bentoml_diffusers.workflow.files.blobs import KIND, encode_base64, name_of
from bentoml_diffusers.workflow.files.bounds import LOCAL, Bounds, count_json_tokens
from bentoml_diffusers.workflow.files.containers import MAX_TEXT_BYTES as MAX_EMBEDDED_BYTES
from bentoml_diffusers.workflow.files.containers import ImageFormat
from bentoml_diffusers.workflow.files.embedding import embed_in_media
from bentoml_diffusers.workflow.files.images import (
    Embedding,
    embed_workflow,
    save_image,
    write_image,
)
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
from bentoml_diffusers.workflow.files.suffixes import IMAGE_SUFFIXES, RESULT_SUFFIXES
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
    "IMAGE_SUFFIXES",
    "KIND",
    "LOCAL",
    "MAX_EMBEDDED_BYTES",
    "Output",
    "OutputPart",
    "ImageFormat",
    "Pipeline",
    "RESULT_SUFFIXES",
    "Scheduler",
    "StoredModel",
    "Workflow",
    "count_json_tokens",
    "embed_in_media",
    "embed_workflow",
    "encode_base64",
    "make_infotext",
    "name_of",
    "save_image",
    "summarize",
    "write_image",
]
