"""The API of ``bentoml.diffusers``: ``load_model``, and the runnable of a legacy runner."""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import bentoml

from bentoml_diffusers import _compat, _names
from bentoml_diffusers.adapters import attach_static_adapters
from bentoml_diffusers.engine import Engine, default_device
from bentoml_diffusers.errors import DiffusersError, InvalidOption, PipelineFailed
from bentoml_diffusers.loading import bundled_pipeline_class, load_pipeline, stored_options
from bentoml_diffusers.options import ModelOptions, option_names
from bentoml_diffusers.serving.startup import say_loading
from bentoml_diffusers.store import get
from bentoml_diffusers.tasks import has_method

if TYPE_CHECKING:
    import torch
    from bentoml import Tag
    from diffusers import ComponentsManager, DiffusionPipeline

logger = logging.getLogger(__name__)


def load_model(
    bento_model: str | Tag | bentoml.Model,
    device_id: str | torch.device | None = None,
    *args: Any,
    components_manager: ComponentsManager | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Loads a stored pipeline.

    Args:
        bento_model: A tag or a ``bentoml.Model``.
        device_id: Where to put it, such as ``"cuda"``; ``None`` leaves it on the CPU.
        *args: The first of the options below, in their order.
        components_manager: diffusers' ``ComponentsManager``; a component with the same files,
            dtype and device that is in it already is not loaded again. Modules that two pipelines
            share must not run in two threads with LoRAs.
        **options: See :class:`ModelOptions`; they override what is stored with the model.

    Raises:
        ModelNotFound: 404, no such model.
        InvalidModel: 400, the model, or an adapter, cannot be loaded.
        InvalidOption: 400, an unknown option or a wrong value.
    """
    given = _LOAD_MODEL_OPTIONS.bind(*args).arguments if args else {}
    model = bento_model if isinstance(bento_model, bentoml.Model) else get(bento_model)
    merged = stored_options(model).overridden_by(ModelOptions.from_mapping({**given, **options}))
    pipeline = load_pipeline(model, merged, device_id, components_manager)
    attach_static_adapters(pipeline, merged)
    return pipeline


_LOAD_MODEL_OPTIONS = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for name in option_names()
        if name != "partial_kwargs"
    ]
)
load_model.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(load_model).parameters.values())[:2],
        *_LOAD_MODEL_OPTIONS.parameters.values(),
        inspect.signature(load_model).parameters["components_manager"],
    ]
)


def get_runnable(bento_model: bentoml.Model) -> type[bentoml.legacy.Runnable]:
    """Returns the runnable of a stored pipeline; ``Model.to_runner()`` calls it.

    Each signature of the model is a method. It takes the arguments of the pipeline's method and
    those of :meth:`bentoml_diffusers.Engine.submit`, and returns the output as a tuple; with
    ``return_workflow=True`` the whole :class:`bentoml_diffusers.Result`.

    Raises:
        InvalidOption: 400, a signature or a preset for a method that the pipeline lacks.
    """
    _compat.install_image_container()
    _compat.let_runner_calls_overlap()
    _compat.keep_thread_counts()
    _compat.quiet_refusals()
    options = _runner_options(stored_options(bento_model))
    _check_methods(bento_model, options)

    class DiffusersRunnable(bentoml.legacy.Runnable):  # type: ignore[misc]
        SUPPORTED_RESOURCES = ("nvidia.com/gpu", "cpu")
        SUPPORTS_CPU_MULTI_THREADING = True
        keeps_thread_counts = True

        def __init__(self) -> None:
            super().__init__()
            merged = _on_accelerator(options)
            with say_loading(bento_model.tag) if _compat.is_runner_process() else nullcontext():
                pipeline = load_pipeline(bento_model, merged, default_device())
                self.engine = Engine(pipeline, merged, model=bento_model)
            self.max_concurrent_calls = self.engine.limits.max_running

        @property
        def pipeline(self) -> DiffusionPipeline:
            return self.engine.pipeline

    for name, signature in bento_model.info.signatures.items():
        if signature.batchable:
            logger.warning(
                "%s: BentoML's batching cannot join calls of a pipeline, %r is not batchable",
                bento_model.tag,
                name,
            )
        DiffusersRunnable.add_method(
            _make_method(name, dict(options.partial_kwargs.get(name, {}))),
            name=name,
            batchable=False,
            input_spec=signature.input_spec,
            output_spec=signature.output_spec,
        )
    return DiffusersRunnable


class Failure:
    """An error on its way out of a runner process: it is raised where it is unpickled.

    BentoML lets a foreign exception of a runner hang until the timeout, and turns its own 4xx
    into an empty 500.
    """

    def __init__(self, error: DiffusersError) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise, (self.error,)


def _raise(error: DiffusersError) -> None:
    raise error


def _make_method(name: str, preset: dict[str, Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            timeout_s = _compat.runner_timeout_s()
            given = {"timeout_s": timeout_s, **preset, **kwargs}
            result = self.engine.run(name, *args, **given)
            return result if given.get("return_workflow") else result.output
        except DiffusersError as error:
            return _deliver(error)
        except Exception as error:
            logger.exception("runner method %r failed", name)
            return _deliver(PipelineFailed(name, error))

    method.__name__ = name
    return method


def _deliver(error: DiffusersError) -> Failure:
    if not _compat.is_runner_process():
        raise error
    return Failure(error)


def _runner_options(options: ModelOptions) -> ModelOptions:
    """As in ``bentoml.diffusers``, a runner reads LoRA files below the working directory."""
    return options if options.lora_dir else replace(options, lora_dir=os.getcwd())


def _on_accelerator(options: ModelOptions) -> ModelOptions:
    """As in ``bentoml.diffusers``: float16 and xformers on a GPU unless said otherwise."""
    from diffusers.utils import is_xformers_available

    if default_device() != "cuda":
        return options
    return ModelOptions(
        torch_dtype="float16", enable_xformers=is_xformers_available() or None
    ).overridden_by(options)


def _check_methods(model: bentoml.Model, options: ModelOptions) -> None:
    for name in options.partial_kwargs:
        if name not in model.info.signatures:
            known = ", ".join(model.info.signatures)
            raise InvalidOption("partial_kwargs", name, f"a method of the signatures: {known}")
    cls = bundled_pipeline_class(options)
    if cls is None and options.pipeline_class is not None and options.custom_pipeline is None:
        cls = _names.resolve_pipeline_class(options.pipeline_class)
    if cls is None or cls is _names.resolve_pipeline_class(None):
        return  # known only once the index, or the custom code, is read
    for name in model.info.signatures:
        if not has_method(cls, name) and name not in _names.TASKS:
            raise InvalidOption("signatures", name, f"tasks, or methods of {cls.__name__}")
