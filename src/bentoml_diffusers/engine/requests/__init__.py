"""Requests: checked and resolved arguments, and results."""

from bentoml_diffusers.engine.requests.faults import check_inputs, invalid_request_from
from bentoml_diffusers.engine.requests.image_prompts import check_ip_adapter
from bentoml_diffusers.engine.requests.latents import fit_latents
from bentoml_diffusers.engine.requests.methods import check_method
from bentoml_diffusers.engine.requests.parts import run_parts, split_request
from bentoml_diffusers.engine.requests.prompts import find_sequence_length, warn_of_prompts
from bentoml_diffusers.engine.requests.request import (
    Handle,
    PreviewPlan,
    Progress,
    Recording,
    Request,
    Result,
    Ticket,
)
from bentoml_diffusers.engine.requests.schedulers import (
    SchedulerChoice,
    choose_scheduler,
    example_of,
    list_scheduler_names,
)
from bentoml_diffusers.engine.requests.schedules import check_steps
from bentoml_diffusers.engine.requests.seeds import choose_seeds
from bentoml_diffusers.engine.requests.tensors import blame_tensors, check_tensors

__all__ = [
    "Handle",
    "PreviewPlan",
    "Progress",
    "Recording",
    "Request",
    "Result",
    "SchedulerChoice",
    "Ticket",
    "blame_tensors",
    "check_inputs",
    "check_ip_adapter",
    "check_method",
    "check_steps",
    "check_tensors",
    "choose_scheduler",
    "choose_seeds",
    "example_of",
    "find_sequence_length",
    "fit_latents",
    "invalid_request_from",
    "list_scheduler_names",
    "run_parts",
    "split_request",
    "warn_of_prompts",
]
