"""Resolves the arguments of a call to a request that can run, or raises the error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bentoml_diffusers.engine.recorder import make_recording
from bentoml_diffusers.engine.requests import (
    PreviewPlan,
    Request,
    check_inputs,
    check_ip_adapter,
    check_method,
    check_steps,
    check_tensors,
    choose_scheduler,
    choose_seeds,
    example_of,
    find_sequence_length,
    fit_latents,
)
from bentoml_diffusers.tasks.checks import (
    check_arguments,
    check_clip_skip,
    check_number,
    count_pixel_steps,
    with_rgb_images,
)
from bentoml_diffusers.tasks.sizes import complete_size, fit_area
from bentoml_diffusers.workflow.replay import fit_to_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters import AdapterBank
    from bentoml_diffusers.tasks import RequestOptions, Task
    from bentoml_diffusers.tasks.finder import Finder
    from bentoml_diffusers.workflow.replay import Plan


class Resolver:
    """Checks requests for one pipeline; reads no file. Thread-safe.

    Args:
        pipeline: The engine's.
        bank: Its adapters.
        tasks: Its tasks.
    """

    def __init__(self, pipeline: DiffusionPipeline, bank: AdapterBank, tasks: Finder) -> None:
        self.pipeline = pipeline
        self._bank = bank
        self._tasks = tasks

    def resolve(
        self,
        name: str,
        args: tuple[Any, ...],
        arguments: Mapping[str, Any],
        options: RequestOptions,
        plan: Plan | None,
    ) -> Request:
        """Returns the request.

        Raises:
            InvalidRequest: 400, an argument is unknown or invalid.
            UntrustedSource: 400, an adapter from a source that is not allowed.
            AdapterNotFound: 404, no such adapter.
        """
        task = self._tasks.find(name)
        if not task.is_modular and task.pipeline_class is type(self.pipeline):
            check_method(self.pipeline, task.method)
        given = dict(arguments)
        guidance_scale = given.pop("guidance_scale", None) if task.is_guided else None
        check_number("guidance_scale", guidance_scale)
        bound = task.bind(args, given)
        recording = make_recording(name, task.with_defaults(bound), options, plan)
        if task.is_modular:
            bound = task.prepare(bound)
        base = getattr(self.pipeline, "scheduler", None)
        choice = choose_scheduler(options.scheduler, base, task.pipeline_class)
        self._check(task, bound, example_of(choice, base))
        canvas = None
        if options.keep_size:
            bound, canvas = fit_to_image(self.pipeline, task, bound)
        bound = fit_latents(self.pipeline, fit_area(task, bound))
        pixels, pixel_steps = count_pixel_steps(self.pipeline, task, bound)
        return Request(
            task=task,
            pipeline_class=task.pipeline_class,
            method=task.method,
            arguments=with_rgb_images(complete_size(self.pipeline, bound)),
            adapters=self._bank.find(options.lora_weights, options.textual_inversions, bound),
            seeds=choose_seeds(task, options.seed, bound),
            scheduler=choice,
            guidance_scale=guidance_scale,
            exclusive=bool(options.exclusive),
            pixel_steps=pixel_steps,
            pixels=max(1, pixels),
            caller=options.caller,
            priority=options.priority,
            previews=PreviewPlan(
                options.preview_every or 0,
                options.preview_count,
                options.preview_interval_s,
                options.preview_quality == "full",
            ),
            recording=recording,
            canvas=canvas,
            max_sequence_length=find_sequence_length(task, bound),
        )

    def _check(self, task: Task, bound: Mapping[str, Any], scheduler: Any) -> None:
        """Checks what needs no adapter and no tensor on the device, in the caller's terms.

        The class's own checks are last: their texts name neither the field nor what is expected.
        """
        cls, defaults = task.pipeline_class, task.with_defaults({})
        check_arguments(task, bound)
        check_steps(cls, defaults, bound, scheduler)
        check_clip_skip(self.pipeline, bound)
        check_tensors(self.pipeline, bound)
        if not task.is_modular:
            check_ip_adapter(self.pipeline, defaults, bound)
            check_inputs(self.pipeline, cls, defaults, bound)
