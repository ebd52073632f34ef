"""Request-scoped views: a separate pipeline object for each request, over shared weights."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from bentoml_diffusers._compat import (
    DECODER_INPUTS,
    DETERMINISTIC_DECODERS,
    copy_blocks,
    drop_hooks,
    fix_execution_device,
    is_compiled,
    restore_text_model,
)
from bentoml_diffusers.engine.forwards import SharedModule, parameter_defaults, texts_of
from bentoml_diffusers.engine.views.noise import seed_encoder
from bentoml_diffusers.engine.views.steps import count_steps
from bentoml_diffusers.loading import denoiser_names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bentoml_diffusers.engine.forwards import Conductor, Member
    from bentoml_diffusers.engine.requests import Request
    from bentoml_diffusers.options import EngineLimits

Components = dict[str, Any]


class Views:
    """Makes the views of one pipeline.

    Args:
        base: The pipeline; it is never changed, and stays on its device.
        limits: Limits of the batches.
        shares_modules: ``False`` gives views with the modules themselves, whose calls are not
            collected.

    Attributes:
        modules: All modules of the pipeline.
    """

    def __init__(
        self, base: DiffusionPipeline, limits: EngineLimits, *, shares_modules: bool
    ) -> None:
        self._base = base
        self._prototypes: dict[type[DiffusionPipeline], DiffusionPipeline] = {}
        self._shared = _list_shared_modules(base, limits) if shares_modules else {}
        self.modules = [
            module for part in _with_inner(base) for module in modules_of(part).values()
        ]

    def make(
        self, request: Request, member: Member, conductor: Conductor, replaced: Mapping[str, Any]
    ) -> DiffusionPipeline:
        """Returns a pipeline for one request: shared modules, its own schedulers and state.

        Args:
            request: The request.
            member: The thread of the request.
            conductor: Runs the calls of shared modules.
            replaced: The request's own components, such as tokenizers.
        """
        prototype = self._prototype(request.pipeline_class)
        parts: dict[int, Any] = {
            key: _shadow(module, functions, member, conductor)
            for key, (module, functions) in self._shared.items()
        }
        for module in parts.values() if request.seeds else ():
            seed_encoder(module, request.seeds[0])
        guider = getattr(self._base, "guider", None)
        if guider is not None:
            parts[id(guider)] = _copy_guider(guider, request.guidance_scale)
        for pipeline in _with_inner(prototype):
            for scheduler in _schedulers_of(pipeline):
                # Deep: schedulers keep the state of a call in lists and tensors.
                parts[id(scheduler)] = copy.deepcopy(scheduler)
        main = getattr(prototype, "scheduler", None)
        if main is not None and request.scheduler is not None:
            parts[id(main)] = request.scheduler.build(main)
        for name, part in replaced.items():
            parts[id(getattr(self._base, name))] = part
        view = _with_parts(prototype, parts)
        view.__dict__.update(replaced)
        for pipeline in _with_inner(view):
            for scheduler in _schedulers_of(pipeline):
                count_steps(scheduler, pipeline, request, member.ticket)
        return view

    def _prototype(self, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
        if cls not in self._prototypes:
            prototype = _with_parts(_as_class(self._base, cls), {})
            for pipeline in _with_inner(prototype):
                _silence(pipeline)
                fix_execution_device(pipeline)
            self._prototypes[cls] = prototype
        return self._prototypes[cls]


def _with_parts(pipeline: DiffusionPipeline, parts: Mapping[int, Any]) -> DiffusionPipeline:
    """Returns a copy with parts replaced by id, also in the pipelines that it contains.

    Not by `setattr`, which would also rewrite the pipeline's config.
    """
    view = copy.copy(pipeline)
    for name, part in vars(pipeline).items():
        if id(part) in parts:
            view.__dict__[name] = parts[id(part)]
        elif isinstance(part, DiffusionPipeline):
            view.__dict__[name] = _with_parts(part, parts)
    return view


def _with_inner(pipeline: DiffusionPipeline) -> list[DiffusionPipeline]:
    """Returns the pipelines inside of a pipeline, such as prior and decoder, then itself."""
    held = [part for part in vars(pipeline).values() if isinstance(part, DiffusionPipeline)]
    return [*(inner for one in held for inner in _with_inner(one)), pipeline]


def _schedulers_of(pipeline: DiffusionPipeline) -> list[Any]:
    return [
        part
        for name, part in vars(pipeline).items()
        if isinstance(part, SchedulerMixin) or (name == "scheduler" and part is not None)
    ]


def _silence(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "blocks"):
        return
    blocks = [copy_blocks(pipeline)]
    while blocks:  # a modular pipeline lists only the first level of its blocks
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
) -> dict[int, tuple[torch.nn.Module, dict[str, SharedModule]]]:
    denoisers = [getattr(base, name) for name in denoiser_names(base)]
    shared: dict[int, tuple[torch.nn.Module, dict[str, SharedModule]]] = {}
    for pipeline in reversed(_with_inner(base)):
        for name, module in modules_of(pipeline).items():
            denoises = any(module is denoiser for denoiser in denoisers)
            functions = {
                method: _describe(name, method, module, limits, denoises=denoises)
                for method in ("forward", "decode")
                if method == "forward" or (hasattr(module, "decode") and _is_decoder(module))
            }
            shared.setdefault(id(module), (module, functions))
    return shared


def _is_decoder(module: Any) -> bool:
    first = next(iter(parameter_defaults(module.decode)), None)
    return first in DECODER_INPUTS


def _describe(
    name: str, method: str, module: Any, limits: EngineLimits, *, denoises: bool
) -> SharedModule:
    is_decode = method == "decode"
    unused = is_decode and type(module).__name__ in DETERMINISTIC_DECODERS
    parameter = next(module.parameters(), None)
    defaults = parameter_defaults(getattr(module, method))
    return SharedModule(
        name=f"{name}.{method}" if is_decode else name,
        run=module.decode if is_decode else module,
        device=parameter.device if parameter is not None else torch.device("cpu"),
        denoises=denoises and not is_decode,
        max_rows=limits.max_decode_rows if is_decode else limits.max_batch_rows,
        defaults=defaults,
        ignored=frozenset({"generator"} if unused else ()),
        in_buckets=not is_decode and is_compiled(module),
        has_cache=not is_decode and {"use_cache", "past_key_values"} <= set(defaults),
        texts=() if is_decode else texts_of(module),
    )


def _shadow(
    module: torch.nn.Module,
    functions: Mapping[str, SharedModule],
    member: Member,
    conductor: Conductor,
) -> torch.nn.Module:
    """Returns a module over the same weights whose calls go to the conductor.

    Without hooks: the conductor calls the module itself, so here they would run twice.
    """
    shadow = copy.copy(module)
    drop_hooks(shadow)
    for method, function in functions.items():
        vars(shadow)[method] = _collect(conductor, member, function)
    restore_text_model(shadow, module)
    return shadow


def _collect(conductor: Conductor, member: Member, function: SharedModule) -> Callable[..., Any]:
    @functools.wraps(getattr(function.run, "forward", function.run))
    def collected(*args: Any, **kwargs: Any) -> Any:
        return conductor.forward(member, function, args, kwargs)

    return collected


def _as_class(base: DiffusionPipeline, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    if cls is type(base):
        return copy.copy(base)
    # Not `cls.from_pipe`: it would cast the shared weights to float32.
    known = inspect.signature(cls.__init__).parameters
    # Some classes modify the config of the scheduler that they get.
    own = {"scheduler": copy.deepcopy(getattr(base, "scheduler", None))}
    given = {**dict(base.config), **base.components, **own}
    return cls(**{name: given[name] for name in known if name in given})
