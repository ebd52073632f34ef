"""A stored model and its options -> a pipeline, as a list of small steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import (
    InvalidModel,
    InvalidOption,
    UnsupportedByPipeline,
    UntrustedSource,
)
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store.layout import PIPELINE_FOLDER, PIPELINE_INDEX
from bentoml_diffusers.store.record import hash_file, read_record

if TYPE_CHECKING:
    import bentoml
    import torch
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def stored_options(model: bentoml.Model) -> ModelOptions:
    """Returns the options that travel with a model, those of ``with_options`` included."""
    options = model.info.options
    if isinstance(options, ModelOptions):
        return options
    return ModelOptions.from_mapping(options.to_dict())


def load_pipeline(
    model: bentoml.Model, options: ModelOptions, device: str | torch.device | None
) -> DiffusionPipeline:
    """Loads the pipeline of a stored model; adapters come later.

    Args:
        model: A stored pipeline.
        options: All options, those stored with the model already merged in.
        device: Where to put it; ``None`` leaves it on the CPU.

    Raises:
        InvalidModel: 400, the model cannot be loaded.
        InvalidOption: 400, an option has a value that cannot be.
        UntrustedSource: 400, the model brings code and ``trust_remote_code`` is not set.
        UnsupportedByPipeline: 400, an option that the pipeline's class lacks.
    """
    folder = Path(model.path_of(PIPELINE_FOLDER))
    record = read_record(Path(model.path))
    if record is not None and record.kind != "pipeline":
        raise InvalidModel(model.tag, f"is a {record.kind}, not a pipeline")
    if not (folder / PIPELINE_INDEX).is_file():
        raise InvalidModel(model.tag, f"has no {PIPELINE_FOLDER}/{PIPELINE_INDEX}")
    pipeline = _from_pretrained(model, folder, options)
    _replace_scheduler(pipeline, options)
    _place(pipeline, options, device)
    _set_attention(pipeline, options)
    _compile_denoiser(pipeline, options)
    return pipeline


def bundled_pipeline_class(options: ModelOptions) -> type[DiffusionPipeline] | None:
    """Returns the class that ``custom_pipeline`` names, if it is one of this package."""
    if options.custom_pipeline not in _names.BUNDLED_PIPELINES:
        return None
    from bentoml_diffusers.loading.mega import StableDiffusionMegaPipeline

    return StableDiffusionMegaPipeline


def denoiser_name(pipeline: DiffusionPipeline) -> str | None:
    """Returns the name of the component that denoises: unet, transformer or prior."""
    for name in ("unet", "transformer", "prior"):
        if getattr(pipeline, name, None) is not None:
            return name
    return None


def _from_pretrained(
    model: bentoml.Model, folder: Path, options: ModelOptions
) -> DiffusionPipeline:
    cls = bundled_pipeline_class(options) or _names.resolve_pipeline_class(options.pipeline_class)
    arguments: dict[str, Any] = {
        "dtype": _names.resolve_dtype(options.torch_dtype),
        "low_cpu_mem_usage": options.low_cpu_mem_usage is not False,
        "device_map": options.device_map,
        "variant": options.variant,
        "use_safetensors": True,
        "local_files_only": True,
        **_trusted_code(options),
        **dict(options.load_pretrained_extra_kwargs or {}),
    }
    try:
        pipeline: DiffusionPipeline = cls.from_pretrained(
            str(folder), **{key: value for key, value in arguments.items() if value is not None}
        )
    except (OSError, ValueError, AttributeError, KeyError, RuntimeError) as err:
        raise InvalidModel(model.tag, f"could not be loaded: {err}") from err
    return pipeline


def _trusted_code(options: ModelOptions) -> dict[str, Any]:
    custom = options.custom_pipeline
    if custom is None or custom in _names.BUNDLED_PIPELINES:
        return {}
    extra = dict(options.load_pretrained_extra_kwargs or {})
    path = Path(custom).expanduser()
    if not (options.trust_remote_code or extra.get("trust_remote_code")):
        code = path / "pipeline.py" if path.is_dir() else path
        digest = f" (sha256 {hash_file(code)})" if code.is_file() else ""
        raise UntrustedSource(
            "custom_pipeline", custom, f"running this code{digest} needs trust_remote_code=True"
        )
    return {"custom_pipeline": str(path) if path.exists() else custom, "trust_remote_code": True}


def _replace_scheduler(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    if options.scheduler_class is not None:
        cls = _names.resolve_scheduler_class(options.scheduler_class)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config)


def _place(
    pipeline: DiffusionPipeline, options: ModelOptions, device: str | torch.device | None
) -> None:
    if options.enable_sequential_cpu_offload:
        _offload(pipeline, "enable_sequential_cpu_offload", device)
    elif options.enable_model_cpu_offload:
        _offload(pipeline, "enable_model_cpu_offload", device)
    elif device is not None and options.device_map is None:
        pipeline.to(device)


def _offload(pipeline: DiffusionPipeline, method: str, device: str | torch.device | None) -> None:
    try:
        getattr(pipeline, method)(**({"device": device} if device is not None else {}))
    except (RuntimeError, ValueError) as err:
        raise InvalidOption(method, True, f"a machine with an accelerator: {err}") from err


def _set_attention(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    if options.enable_xformers:
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as err:
            raise InvalidOption("enable_xformers", True, f"xformers and a GPU: {err}") from err
    if options.enable_attention_slicing is not None:
        pipeline.enable_attention_slicing(options.enable_attention_slicing)


def _compile_denoiser(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    if not options.enable_torch_compile:
        return
    name = denoiser_name(pipeline)
    if name is None:
        raise UnsupportedByPipeline(type(pipeline).__name__, "enable_torch_compile")
    logger.info("compiling %s at its first run", name)
    # In place: a wrapper module would hide the denoiser from adapters and from save_pretrained.
    getattr(pipeline, name).compile()
