"""From a call of a pipeline to a workflow: pipeline, arguments, environment and output."""

from bentoml_diffusers.workflow.record.calls import (
    Captured,
    Ran,
    capture,
    complete_arguments,
    record_call,
)
from bentoml_diffusers.workflow.record.description import (
    describe_guider,
    describe_pipeline,
    describe_scheduler,
    plain_config,
)
from bentoml_diffusers.workflow.record.environment import (
    device_of,
    processor_name,
    read_environment,
)
from bentoml_diffusers.workflow.record.host import AdapterSource, Host
from bentoml_diffusers.workflow.record.outputs import hash_output
from bentoml_diffusers.workflow.record.values import Decoder, Encoder, UnsupportedValue

__all__ = [
    "AdapterSource",
    "Captured",
    "Decoder",
    "Encoder",
    "Host",
    "Ran",
    "UnsupportedValue",
    "capture",
    "complete_arguments",
    "describe_guider",
    "describe_pipeline",
    "describe_scheduler",
    "device_of",
    "hash_output",
    "plain_config",
    "processor_name",
    "read_environment",
    "record_call",
]
