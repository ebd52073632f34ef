"""Request-scoped views: a pipeline object of its own for each request, over shared weights."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from bentoml_diffusers._compat import fix_execution_device, is_compiled
from bentoml_diffusers.engine.conductor import SharedModule, parameter_defaults
from bentoml_diffusers.engine.preview import paint_preview
from bentoml_diffusers.loading import denoiser_names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffusers import DiffusionPipeline

    from bentoml_diffusers.engine.conductor import Conductor, Member
    from bentoml_diffusers.engine.request import Request, Ticket
    from bentoml_diffusers.options import EngineLimits

# Decoders that take a generator and never use it.
_DETERMINISTIC_DECODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")

Components = dict[str, Any]


class Views:
    """Makes the views of one pipeline.

    Args:
        base: The pipeline; nothing of it is ever changed, and it stays on its device.
        limits: Bounds of the batches.
        shares_modules: ``False`` gives views with the modules themselves, whose calls are not
            collected.
    """

    def __init__(
        self, base: DiffusionPipeline, limits: EngineLimits, *, shares_modules: bool
    ) -> None:
        self._base = base
        self._prototypes: dict[type[DiffusionPipeline], DiffusionPipeline] = {}
        self._shared = _list_shared_modules(base, limits) if shares_modules else {}

    def make(
        self, request: Request, member: Member, conductor: Conductor, replaced: Mapping[str, Any]
    ) -> DiffusionPipeline:
        """Returns a pipeline for one request: shared modules, its own scheduler and state.

        Args:
            request: What was asked.
            member: The thread of the request.
            conductor: Runs the calls of shared modules.
            replaced: Components of this request's own, such as tokenizers.
        """
        view = copy.copy(self._prototype(request.pipeline_class))
        # Not by `setattr`: that also rewrites the pipeline's config.
        view.__dict__.update(replaced)
        for name, functions in self._shared.items():
            view.__dict__[name] = _shadow(getattr(self._base, name), functions, member, conductor)
        guider = getattr(self._base, "guider", None)
        if guider is not None:
            view.__dict__["guider"] = _copy_guider(guider, request.guidance_scale)
        scheduler = getattr(view, "scheduler", None)
        if scheduler is not None:
            choice = request.scheduler
            own = copy.deepcopy(scheduler) if choice is None else choice.build(scheduler)
            view.__dict__["scheduler"] = own
            _count_steps(view, own, request, member.ticket)
        return view

    def _prototype(self, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
        if cls not in self._prototypes:
            prototype = _as_class(self._base, cls)
            _silence(prototype)
            fix_execution_device(prototype)
            self._prototypes[cls] = prototype
        return self._prototypes[cls]


def _silence(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "blocks"):
        return
    pipeline._blocks = pipeline.blocks  # `blocks` is a copy
    blocks = [pipeline._blocks]
    while blocks:  # a modular pipeline tells only the first level of its blocks
        block = blocks.pop()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        blocks += getattr(block, "sub_blocks", {}).values()


def _copy_guider(guider: Any, guidance_scale: float | None) -> Any:
    if guidance_scale is None:
        return copy.deepcopy(guider)
    return guider.new(guidance_scale=guidance_scale)


def modules_of(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Returns the components of a pipeline that have weights."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def _list_shared_modules(
    base: DiffusionPipeline, limits: EngineLimits
) -> dict[str, dict[str, SharedModule]]:
    """Returns, for each component, its functions whose calls can be joined."""
    denoisers = denoiser_names(base)
    return {
        name: {
            method: _describe(name, method, module, limits, denoises=name in denoisers)
            for method in ("forward", "decode")
            if method == "forward" or (hasattr(module, "decode") and _is_decoder(module))
        }
        for name, module in modules_of(base).items()
    }


def _is_decoder(module: Any) -> bool:
    first = next(iter(parameter_defaults(module.decode)), None)
    return first in ("z", "x", "latents", "latent", "h")


def _describe(
    name: str, method: str, module: Any, limits: EngineLimits, *, denoises: bool
) -> SharedModule:
    is_decode = method == "decode"
    unused = is_decode and type(module).__name__ in _DETERMINISTIC_DECODERS
    parameter = next(module.parameters(), None)
    return SharedModule(
        name=f"{name}.{method}" if is_decode else name,
        run=module.decode if is_decode else module,
        device=parameter.device if parameter is not None else torch.device("cpu"),
        denoises=denoises and not is_decode,
        max_rows=limits.max_decode_rows if is_decode else limits.max_batch_rows,
        defaults=parameter_defaults(getattr(module, method)),
        ignored=frozenset({"generator"} if unused else ()),
        in_buckets=not is_decode and is_compiled(module),
    )


def _shadow(
    module: torch.nn.Module,
    functions: Mapping[str, SharedModule],
    member: Member,
    conductor: Conductor,
) -> torch.nn.Module:
    """Returns a module over the same weights whose calls go to the conductor.

    Hooks belong to the module itself, which the conductor calls: here they would run twice.
    """
    shadow = copy.copy(module)
    for name in vars(shadow):
        if name.endswith("_hooks") and isinstance(vars(shadow)[name], OrderedDict):
            vars(shadow)[name] = OrderedDict()
    for method, function in functions.items():
        vars(shadow)[method] = _collect(conductor, member, function)
    return shadow


def _collect(conductor: Conductor, member: Member, function: SharedModule) -> Callable[..., Any]:
    @functools.wraps(getattr(function.run, "forward", function.run))
    def collected(*args: Any, **kwargs: Any) -> Any:
        return conductor.forward(member, function, args, kwargs)

    return collected


def _as_class(base: DiffusionPipeline, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    if cls is type(base):
        return copy.copy(base)
    # Not `cls.from_pipe`: it casts the shared weights to float32.
    known = inspect.signature(cls.__init__).parameters
    # Some classes correct the config of the scheduler that they are given.
    own = {"scheduler": copy.deepcopy(getattr(base, "scheduler", None))}
    given = {**dict(base.config), **base.components, **own}
    return cls(**{name: given[name] for name in known if name in given})


def _count_steps(view: DiffusionPipeline, scheduler: Any, request: Request, ticket: Ticket) -> None:
    name = "step" if hasattr(scheduler, "step") else "step_pred"  # the score SDEs call it so
    step = getattr(scheduler, name, None)
    if step is None:
        return
    every = request.preview_every

    @functools.wraps(step)
    def counted_step(*args: Any, **kwargs: Any) -> Any:
        ticket.check()
        result = step(*args, **kwargs)
        total = len(scheduler.timesteps)
        done = ticket.steps_done + 1
        wants_preview = every and done % every == 0 and done < total
        preview = paint_preview(view, result, request.arguments) if wants_preview else None
        ticket.count_step(total, preview)
        return result

    setattr(scheduler, name, counted_step)
