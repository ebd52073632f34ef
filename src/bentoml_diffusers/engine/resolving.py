"""From what a caller gave to a request that can run, or to the error that says why it cannot."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.engine.arguments import (
    Parameters,
    bind_arguments,
    check_arguments,
    check_clip_skip,
    check_number,
    count_pixel_steps,
    has_method,
    read_modular_parameters,
    read_parameters,
    with_rgb_images,
)
from bentoml_diffusers.engine.latents import fit_latents
from bentoml_diffusers.engine.modular import ModularTasks
from bentoml_diffusers.engine.prompts import find_sequence_length
from bentoml_diffusers.engine.recording import make_recording
from bentoml_diffusers.engine.request import OWN_ARGUMENTS, Plan, Request
from bentoml_diffusers.engine.schedulers import choose_scheduler
from bentoml_diffusers.engine.seeds import choose_seeds
from bentoml_diffusers.engine.sizes import complete_size
from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.workflow.canvas import fit_to_image
from bentoml_diffusers.workflow.describing import is_modular

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters import AdapterBank

Call = tuple[type[Any], str, Parameters]


class Resolver:
    """Finds calls and checks requests for one pipeline; reads no file. Safe from any thread.

    Args:
        pipeline: The engine's.
        bank: Its adapters.
        modular_workflow: Name of the modular workflow that its blocks were cut down to, if any.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, bank: AdapterBank, modular_workflow: str | None = None
    ) -> None:
        self.pipeline = pipeline
        self._bank = bank
        self._modular = ModularTasks(pipeline, modular_workflow) if is_modular(pipeline) else None
        self.find_call: Callable[[str], Call] = functools.cache(self._find_task)

    def resolve(
        self, task: str, args: tuple[Any, ...], given: dict[str, Any], plan: Plan | None
    ) -> Request:
        """Returns the request.

        Raises:
            InvalidRequest: 400, an argument is unknown or wrong.
            UntrustedSource: 400, an adapter from a source that is not allowed.
            AdapterNotFound: 404, no such adapter.
        """
        arguments = dict(given)
        own = {name: arguments.pop(name, None) for name in OWN_ARGUMENTS}
        cls, method, parameters = self.find_call(task)
        guidance_scale = arguments.pop("guidance_scale", None) if parameters.guided else None
        check_number("guidance_scale", guidance_scale)
        bound = bind_arguments(parameters, args, arguments)
        recording = make_recording(task, parameters.complete(bound), own, plan)
        if parameters.modular is not None:
            bound = parameters.modular.complete(bound)
        base = getattr(self.pipeline, "scheduler", None)
        check_arguments(parameters, bound, base)
        check_clip_skip(self.pipeline, bound)
        canvas = None
        if own["keep_size"]:
            bound, canvas = fit_to_image(self.pipeline, parameters.defaults, bound)
        bound = fit_latents(self.pipeline, bound)
        return Request(
            pipeline_class=cls,
            method=method,
            arguments=with_rgb_images(complete_size(self.pipeline, bound)),
            adapters=self._bank.find(own["lora_weights"], own["textual_inversions"], bound),
            seeds=choose_seeds(parameters, own["seed"], bound),
            scheduler=choose_scheduler(own["scheduler"], base),
            guidance_scale=guidance_scale,
            exclusive=bool(own["exclusive"]),
            pixel_steps=count_pixel_steps(self.pipeline, parameters, bound),
            preview_every=own["preview_every"] or 0,
            recording=recording,
            canvas=canvas,
            max_sequence_length=find_sequence_length(parameters.defaults, bound),
        )

    def _find_task(self, task: str) -> Call:
        own = type(self.pipeline)
        if task.startswith("_") and task != "__call__":
            raise InvalidRequest("task", task, "a task or a public method")
        if self._modular is not None:
            workflow = self._modular.find(task)
            return own, "__call__", read_modular_parameters(self.pipeline, workflow)
        if has_method(own, task):
            return own, task, read_parameters(own, task)
        if task in _names.TASKS:
            cls = _names.task_class(self.pipeline, task)
            return cls, "__call__", read_parameters(cls, "__call__")
        raise InvalidRequest(
            "task", task, f"one of {', '.join(_names.TASKS)}, or a method of {own.__name__}"
        )
