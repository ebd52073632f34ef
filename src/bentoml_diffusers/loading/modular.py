"""Loads a stored modular pipeline with all its components; a missing one is an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers._compat import quantization_of
from bentoml_diffusers.errors import (
    DiffusersError,
    InvalidModel,
    InvalidOption,
    UnsupportedByPipeline,
)
from bentoml_diffusers.loading.custom_code import RunningCode, run_code, run_stored_code
from bentoml_diffusers.loading.ip_adapter import restore_ip_adapter
from bentoml_diffusers.options import ModelOptions
from bentoml_diffusers.store import (
    IP_ADAPTER_FOLDER,
    MODULAR_INDEX,
    PIPELINE_FOLDER,
    complete_workflows,
    expected_names,
    read_blocks,
    read_index,
    read_json,
    read_modular_components,
    read_record,
)

if TYPE_CHECKING:
    import bentoml
    from diffusers import ComponentsManager, ModularPipeline
    from diffusers.modular_pipelines import ComponentSpec, ModularPipelineBlocks

    from bentoml_diffusers.loading.sharing import Shared
    from bentoml_diffusers.store import Record

_REFUSED = ("device_map", "enable_sequential_cpu_offload")


def is_modular(folder: Path, options: ModelOptions) -> bool:
    """True if a stored pipeline is modular, or shall be loaded as one."""
    return (folder / MODULAR_INDEX).is_file() or _names.is_modular_class(options.pipeline_class)


def stored_blocks(
    model: bentoml.Model, options: ModelOptions | None = None
) -> ModularPipelineBlocks:
    """Returns the blocks of a stored modular pipeline, without loading a component.

    Imports the code that comes with the model, if there is any and it is trusted.

    Args:
        model: A stored modular pipeline.
        options: ``modular_workflow`` selects the blocks; ``trust_remote_code`` is used, too.

    Raises:
        InvalidModel: 400, not a modular pipeline, or a broken one.
        InvalidOption: 400, no such modular workflow.
        UntrustedSource: 400, the model brings code that is not trusted.
    """
    options = options or ModelOptions()
    folder = Path(model.path_of(PIPELINE_FOLDER))
    if not is_modular(folder, options):
        raise InvalidModel(
            model.tag,
            "is not a modular pipeline",
            "import it with pipeline_class='ModularPipeline'",
        )
    index = _read_index(model, folder)
    blocks = _make_blocks(model, folder, read_record(Path(model.path)), options, index)
    return _prune(blocks, options.modular_workflow)


def load_modular(
    model: bentoml.Model,
    folder: Path,
    record: Record | None,
    options: ModelOptions,
    shared: Shared,
) -> ModularPipeline:
    """Loads a modular pipeline with its components.

    Args:
        model: A stored pipeline.
        folder: Its pipeline.
        record: Its record.
        options: All options, those stored with the model already merged in.
        shared: Components that are loaded already.

    Raises:
        InvalidModel: 400, a component is missing, or cannot be loaded.
        InvalidOption: 400, an option has an invalid value.
        UntrustedSource: 400, the model brings code that is not trusted.
        UnsupportedByPipeline: 400, an option that modular pipelines lack.
    """
    cls, index = _find_class(model, folder, options)
    _refuse_options(cls, options)
    blocks = _prune(_make_blocks(model, folder, record, options, index), options.modular_workflow)
    named = set(read_modular_components(index, str(model.tag)))
    complete_workflows(blocks, named, str(model.tag), options.modular_workflow or "")
    pipeline: ModularPipeline = cls(
        blocks=blocks,
        pretrained_model_name_or_path=str(folder),
        components_manager=shared.manager or _own_manager(options),
        modular_config_dict=index,
    )
    wanted = [name for name in pipeline.pretrained_component_names if name in named]
    if options.variant and not any(_has_variant(folder, key, options.variant) for key in wanted):
        raise InvalidOption(
            "variant", options.variant, "a variant that was imported with the model"
        )
    # Every call needs its embeddings, so without their input every call would fail.
    with_adapter = "ip_adapter_image" in blocks.input_names and _has_ip_adapter(folder)
    loaded = {
        name: shared.take(name, with_adapter=with_adapter)
        or _load(model, folder, pipeline.get_component_spec(name), options)
        for name in wanted
    }
    pipeline.register_components(**loaded)
    _restore_configs(pipeline, folder)
    if with_adapter and not shared.has("unet"):
        restore_ip_adapter(pipeline, folder, str(model.tag))
    shared.keep(loaded, with_adapter=with_adapter)
    return pipeline


def _read_index(model: bentoml.Model, folder: Path) -> dict[str, Any]:
    index = read_index(folder, str(model.tag))
    classic = index.as_modular()
    if index.is_modular:
        return classic
    known = expected_names(read_blocks(folder, classic, str(model.tag)))
    parts = read_modular_components(classic, str(model.tag))
    return {key: value for key, value in classic.items() if key in known or key not in parts}


def _find_class(
    model: bentoml.Model, folder: Path, options: ModelOptions
) -> tuple[type[ModularPipeline], dict[str, Any]]:
    index = _read_index(model, folder)
    given = options.pipeline_class
    if given is not None and not _names.is_modular_class(given):
        raise InvalidOption("pipeline_class", given, "a modular class: the model is modular")
    name = index["_class_name"]
    if not _names.is_modular_class(name):
        raise InvalidModel(model.tag, f"names {name}, which is not a modular pipeline of diffusers")
    found: type[Any] = _names.resolve_pipeline_class(name)
    if given is not None and _names.resolve_pipeline_class(given).__name__ != "ModularPipeline":
        found = _names.resolve_pipeline_class(given)
    return found, index


def _make_blocks(
    model: bentoml.Model,
    folder: Path,
    record: Record | None,
    options: ModelOptions,
    index: dict[str, Any],
) -> ModularPipelineBlocks:
    code = _run_code(model, folder, record, options)
    names_class = record is not None and record.code is not None and record.code.class_name
    if code is not None and (options.custom_pipeline or names_class):
        return code.blocks_class()()
    find_class = code.block_class if code is not None else None
    return read_blocks(folder, index, str(model.tag), find_class)


def _run_code(
    model: bentoml.Model, folder: Path, record: Record | None, options: ModelOptions
) -> RunningCode | None:
    if options.custom_pipeline in _names.BUNDLED_PIPELINES:
        raise InvalidOption(
            "custom_pipeline", options.custom_pipeline, "blocks: the model is modular"
        )
    trust = bool(options.trust_remote_code)
    if options.custom_pipeline is not None:
        return run_code(options.custom_pipeline, folder, trust=trust)
    if record is not None and record.code is not None:
        return run_stored_code(model, record.code, trust=trust)
    return None


def _prune(blocks: ModularPipelineBlocks, workflow: str | None) -> ModularPipelineBlocks:
    if workflow is None:
        return blocks
    try:
        known = list(blocks.available_workflows)
    except NotImplementedError:
        known = []
    if workflow not in known:
        raise InvalidOption(
            "modular_workflow",
            workflow,
            f"one of {', '.join(known)}" if known else "none: its blocks have no modular workflows",
        )
    return blocks.get_workflow(workflow)


def _refuse_options(cls: type[Any], options: ModelOptions) -> None:
    extra = dict(options.load_pretrained_extra_kwargs or {})
    extra.pop("trust_remote_code", None)
    if extra:
        raise UnsupportedByPipeline(cls.__name__, "load_pretrained_extra_kwargs")
    for name in _REFUSED:
        if getattr(options, name):
            raise UnsupportedByPipeline(cls.__name__, name)
    if options.offload_kind == "sequential":
        raise UnsupportedByPipeline(cls.__name__, "offload='sequential'")


def _own_manager(options: ModelOptions) -> ComponentsManager | None:
    """Returns a components manager, through which diffusers offloads modular pipelines."""
    from diffusers import ComponentsManager

    return ComponentsManager() if options.offload_kind == "model" else None


def _load(model: bentoml.Model, folder: Path, spec: ComponentSpec, options: ModelOptions) -> Any:
    name = str(spec.name)
    if not (folder / name).is_dir():
        raise InvalidModel(
            model.tag, f"lacks the folder of {name!r}, which its {MODULAR_INDEX} names"
        )
    arguments = {
        "pretrained_model_name_or_path": str(folder),
        "subfolder": name,
        "revision": None,
        "variant": options.variant if _has_variant(folder, name, options.variant) else spec.variant,
        "local_files_only": True,
        **_module_arguments(spec, options),
    }
    try:
        return spec.load(**arguments)
    except DiffusersError:
        raise
    except Exception as err:  # diffusers would only warn, and skip the component
        reason = str(err).replace(str(folder), PIPELINE_FOLDER)
        raise InvalidModel(model.tag, f"could not be loaded: {name}: {reason}") from err


def _module_arguments(spec: ComponentSpec, options: ModelOptions) -> dict[str, Any]:
    """Returns arguments for components with weights; others would store them in their config."""
    import torch
    from diffusers import AutoModel, ModelMixin

    kind = spec.type_hint
    if kind is not None and not issubclass(kind, (torch.nn.Module, AutoModel)):
        return {}
    arguments: dict[str, Any] = {
        "dtype": _names.resolve_dtype(options.torch_dtype or "float32"),
        "low_cpu_mem_usage": options.low_cpu_mem_usage is not False,
        "use_safetensors": True,
    }
    quantization = _names.resolve_quantization(options.quantization_config)
    if quantization is not None:
        is_diffusers = kind is None or issubclass(kind, ModelMixin)
        config = quantization_of(quantization, is_diffusers=is_diffusers, component=spec.name)
        arguments.update({} if config is None else {"quantization_config": config})
    return arguments


def _has_variant(folder: Path, name: str, variant: str | None) -> bool:
    return bool(variant) and any((folder / name).glob(f"*.{variant}*"))


def _restore_configs(pipeline: ModularPipeline, folder: Path) -> None:
    """Restores components that diffusers makes from a config, such as image processors."""
    for name in pipeline.config_component_names:
        spec = pipeline.get_component_spec(name)
        path = folder / name / getattr(spec.type_hint, "config_name", "config.json")
        if path.is_file():
            component = spec.create(config=read_json(path, name))
            pipeline.update_components(**{name: component})


def _has_ip_adapter(folder: Path) -> bool:
    return (folder / IP_ADAPTER_FOLDER).is_dir()
