"""Loads a pipeline from a stored model and its options, as a list of small steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bentoml_diffusers import _names
from bentoml_diffusers.errors import (
    DiffusersError,
    InvalidModel,
    InvalidOption,
    UnsupportedByPipeline,
)
from bentoml_diffusers.loading.custom_code import run_code, run_stored_code
from bentoml_diffusers.loading.ip_adapter import restore_ip_adapter
from bentoml_diffusers.loading.modular import is_modular, load_modular
from bentoml_diffusers.loading.placement import place
from bentoml_diffusers.loading.sharing import Shared
from bentoml_diffusers.loading.tokenizers import check_tokenizers
from bentoml_diffusers.loading.tuning import (
    cast_layers,
    compile_denoiser,
    set_attention,
    set_memory_format,
    set_vae,
    use_step_cache,
)
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store import (
    IP_ADAPTER_FOLDER,
    MODULAR_INDEX,
    PIPELINE_FOLDER,
    PIPELINE_INDEX,
    Record,
    check_stamps,
    find_left_out,
    read_index,
    read_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import bentoml
    import torch
    from diffusers import ComponentsManager, DiffusionPipeline

_OWN_ARGUMENTS = ("custom_pipeline", "use_safetensors", "local_files_only", "allow_pickle")


def stored_options(model: bentoml.Model) -> ModelOptions:
    """Returns the options that travel with a model, those of ``with_options`` included.

    Trust in code does not travel: it counts only in a call or in ``with_options``.
    """
    options = model.info.options
    if not isinstance(options, ModelOptions):
        options = ModelOptions.from_mapping(options.to_dict())
    return _without_stored_trust(options, Path(model.path))


def load_pipeline(
    model: bentoml.Model,
    options: ModelOptions,
    device: str | torch.device | None,
    components_manager: ComponentsManager | None = None,
) -> DiffusionPipeline:
    """Loads the pipeline of a stored model, without adapters.

    Args:
        model: A stored pipeline.
        options: All options, those stored with the model already merged in.
        device: Device for the pipeline; ``None`` leaves it on the CPU.
        components_manager: Components that it has already are not loaded again.

    Raises:
        InvalidModel: 400, the model cannot be loaded, was changed after its import, or has a
            tokenizer that gives the same tokens for all prompts.
        InvalidOption: 400, an option has an invalid value.
        UntrustedSource: 400, the model brings code that is not trusted.
        UnsupportedByPipeline: 400, an option that the pipeline's class lacks.
    """
    folder = Path(model.path_of(PIPELINE_FOLDER))
    record = read_record(Path(model.path))
    if record is not None and record.kind != "pipeline":
        raise InvalidModel(model.tag, f"is a {record.kind}, not a pipeline")
    if not any((folder / index).is_file() for index in (PIPELINE_INDEX, MODULAR_INDEX)):
        raise InvalidModel(model.tag, f"does not contain {PIPELINE_FOLDER}/{PIPELINE_INDEX}")
    if record is not None:
        check_stamps(str(model.tag), folder, record.stamps, record.files)
    shared = Shared(components_manager, model, options, device)
    load = load_modular if is_modular(folder, options) else _from_pretrained
    pipeline = load(model, folder, record, options, shared)
    check_tokenizers(pipeline, model.tag)
    _replace_scheduler(pipeline, options)
    cast_layers(pipeline, options)
    set_memory_format(pipeline, options)
    place(pipeline, options, device)
    for tune in _TUNING:
        tune(pipeline, options)
    return pipeline


_TUNING: tuple[Callable[[Any, ModelOptions], None], ...] = (
    set_attention,
    set_vae,
    use_step_cache,
    compile_denoiser,
)


def bundled_pipeline_class(options: ModelOptions) -> type[DiffusionPipeline] | None:
    """Returns the class that ``custom_pipeline`` names, if it is one of this package."""
    if options.custom_pipeline == "stable_diffusion_mega":
        from bentoml_diffusers.loading.mega import StableDiffusionMegaPipeline

        return StableDiffusionMegaPipeline
    if options.custom_pipeline == "score_sde_vp":
        from bentoml_diffusers.loading.score_sde_vp import ScoreSdeVpPipeline

        return ScoreSdeVpPipeline
    return None


def _from_pretrained(
    model: bentoml.Model,
    folder: Path,
    record: Record | None,
    options: ModelOptions,
    shared: Shared,
) -> DiffusionPipeline:
    cls = _find_class(model, folder, record, options)
    if options.modular_workflow is not None:
        raise UnsupportedByPipeline(
            cls.__name__, "modular_workflow: only modular pipelines have them"
        )
    with_adapter = (folder / IP_ADAPTER_FOLDER).is_dir()
    try:
        given = {
            **_load_left_out(folder),
            **shared.take_all(with_adapter=with_adapter),
            **_loader_arguments(folder, record, options),
        }
        pipeline: DiffusionPipeline = cls.from_pretrained(str(folder), **given)
        if "dtype" not in given and not _holds_float32(pipeline):
            float32 = _names.resolve_dtype("float32")
            pipeline = cls.from_pretrained(str(folder), **given, dtype=float32)
    except DiffusersError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, RuntimeError, ImportError) as err:
        raise InvalidModel(model.tag, f"could not be loaded: {err}") from err
    if with_adapter and not shared.has("unet"):
        restore_ip_adapter(pipeline, folder, str(model.tag))
    shared.keep_classic(pipeline, with_adapter=with_adapter)
    return pipeline


def _load_left_out(folder: Path) -> dict[str, Any]:
    """Loads the components that diffusers' own loader skips."""
    classes = {
        name: _names.component_class(*component)
        for name, component in find_left_out(folder).items()
    }
    return {
        name: cls.from_pretrained(folder / name, local_files_only=True)
        for name, cls in classes.items()
        if cls is not None
    }


def _loader_arguments(folder: Path, record: Record | None, options: ModelOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dtype": _find_dtype(folder, options),
        "low_cpu_mem_usage": options.low_cpu_mem_usage is not False,
        "device_map": options.device_map,
        "variant": options.variant,
        "quantization_config": _names.resolve_quantization(options.quantization_config),
        # Models of BentoML's own module may hold pickles, of which diffusers reads only tensors.
        "use_safetensors": True if record is not None else None,
        "local_files_only": True,
    }
    given = {key: value for key, value in arguments.items() if value is not None}
    return {
        **given,
        **_extra_arguments(options),
    }  # here an explicit `safety_checker=None` has a meaning


def _find_dtype(folder: Path, options: ModelOptions) -> torch.dtype | None:
    """Without a dtype diffusers loads any file as float32, transformers as its config says.

    So float32 is passed, unless both choose it by themselves: passing it takes 2 % longer.
    """
    is_open = not (
        options.torch_dtype or options.quantization_config or options.load_pretrained_extra_kwargs
    )
    if is_open:
        configs = [json.loads(path.read_text()) for path in folder.glob("*/config.json")]
        if all(_is_float32(config) for config in configs):
            return None
    return _names.resolve_dtype(options.torch_dtype or "float32")


def _is_float32(config: Mapping[str, Any]) -> bool:
    dtypes = (config.get("dtype"), config.get("torch_dtype"))
    return "quantization_config" not in config and (
        "_diffusers_version" in config or "float32" in dtypes
    )


def _holds_float32(pipeline: DiffusionPipeline) -> bool:
    """False if torch's default dtype, shared by all threads, was changed meanwhile."""
    import torch

    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    parameters = (parameter for part in parts for parameter in part.parameters())
    return all(one.dtype is torch.float32 for one in parameters if one.is_floating_point())


def _find_class(
    model: bentoml.Model, folder: Path, record: Record | None, options: ModelOptions
) -> type[DiffusionPipeline]:
    """The class asked for, else that of code stored with the model, else that of the index."""
    bundled = bundled_pipeline_class(options)
    if bundled is not None:
        return bundled
    trust = _is_trusted(options)
    if options.custom_pipeline is not None:
        return run_code(options.custom_pipeline, folder, trust=trust).pipeline_class()
    if options.pipeline_class is not None:
        return _names.resolve_pipeline_class(options.pipeline_class)
    if record is not None and record.code is not None:
        return run_stored_code(model, record.code, trust=trust).pipeline_class()
    index = read_index(folder, str(model.tag))
    own = _names.BUNDLED_CLASSES.get(index.class_name)
    if own is not None:
        options = replace(options, custom_pipeline=own)
    elif isinstance(index.values["_class_name"], list):  # stored by BentoML's own module
        return run_code(index.values["_class_name"][0], folder, trust=trust).pipeline_class()
    return bundled_pipeline_class(options) or _names.resolve_pipeline_class(None)


def find_pipeline_class(model: bentoml.Model, options: ModelOptions) -> type[DiffusionPipeline]:
    """Returns the class that a stored classic pipeline will have; loads no weights.

    Raises:
        InvalidModel: 400, no such class is there.
        UntrustedSource: 400, it is in code that is not trusted.
    """
    folder = Path(model.path_of(PIPELINE_FOLDER))
    found = _find_class(model, folder, read_record(Path(model.path)), options)
    if "__call__" in vars(found) or any("__call__" in vars(base) for base in found.__mro__[:-1]):
        return found
    named = _names.exported_class(read_index(folder, str(model.tag)).class_name)
    return named or found


def _is_trusted(options: ModelOptions) -> bool:
    extra = options.load_pretrained_extra_kwargs or {}  # where `bentoml.diffusers` had it
    return bool(options.trust_remote_code or extra.get("trust_remote_code"))


def _extra_arguments(options: ModelOptions) -> dict[str, Any]:
    extra = dict(options.load_pretrained_extra_kwargs or {})
    extra.pop("trust_remote_code", None)  # our own loading of code has checked the trust
    for name in _OWN_ARGUMENTS:
        if name in extra:
            raise InvalidOption(
                "load_pretrained_extra_kwargs",
                name,
                "only arguments that are not options of this package",
            )
    return extra


def _without_stored_trust(options: ModelOptions, entry: Path) -> ModelOptions:
    if not _is_trusted(options):
        return options
    content = yaml.safe_load((entry / "model.yaml").read_text())
    stored = ModelOptions.from_mapping(content.get("options") or {})
    if not _is_trusted(stored):
        return options  # it comes from `with_options`
    extra = dict(options.load_pretrained_extra_kwargs or {})
    extra.pop("trust_remote_code", None)
    return replace(options, trust_remote_code=None, load_pretrained_extra_kwargs=extra or None)


def _replace_scheduler(pipeline: DiffusionPipeline, options: ModelOptions) -> None:
    if options.scheduler_class is not None:
        cls = _names.resolve_scheduler_class(options.scheduler_class)
        if getattr(pipeline, "scheduler", None) is None:
            raise UnsupportedByPipeline(type(pipeline).__name__, "scheduler_class")
        scheduler = cls.from_config(pipeline.scheduler.config)
        if hasattr(pipeline, "update_components"):
            pipeline.update_components(scheduler=scheduler)
        else:
            pipeline.scheduler = scheduler
