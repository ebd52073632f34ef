"""Names <-> classes. Nothing else in this package turns text into code.

Only classes that diffusers itself exports can be named; a class object is returned unchanged.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _compat
from bentoml_diffusers.errors import InvalidOption, InvalidRequest, suggest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from diffusers import DiffusionPipeline, ModularPipeline, SchedulerMixin
    from diffusers.modular_pipelines import ModularPipelineBlocks

# They pass the tag, and the EmbedOptions that are on, to the processes of `serve TAG`.
TAG_VARIABLE = "BENTOML_DIFFUSERS_TAG"
EMBED_VARIABLE = "BENTOML_DIFFUSERS_EMBED"
ACCESS_VARIABLE = "BENTOML_DIFFUSERS_ACCESS"  # and in JSON who may call
JOBS_VARIABLE = "BENTOML_DIFFUSERS_JOBS"
BUNDLED_PIPELINES = ("stable_diffusion_mega", "score_sde_vp")
BUNDLED_CLASSES = {
    "StableDiffusionMegaPipeline": "stable_diffusion_mega",
    "ScoreSdeVpPipeline": "score_sde_vp",
}

_LONGEST_NAME = 64  # compare only so many characters of an unknown name with the known ones

# Those of diffusers' auto pipelines, and what other classes do by themselves.
TASKS = (*_compat.AUTO_TASKS, "edit", "upscale", "audio2audio", "unconditional")

# Names of samplers in AUTOMATIC1111's web UI, as in the table of diffusers' documentation
# (docs/source/en/api/schedulers/overview.md): a class, and what differs in its config.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
}
SIGMAS = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Beta": "use_beta_sigmas",
}

# Field names of other image APIs, and our names for them; the first that exists is suggested.
FIELD_ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("steps", "num_steps", "inference_steps", "sampling_steps", "sample_steps", "n_steps"),
        ("num_inference_steps",),
    ),
    **dict.fromkeys(("cfg_scale", "cfg", "guidance", "cfg_guidance"), ("guidance_scale",)),
    **dict.fromkeys(
        ("sampler", "sampler_name", "sampler_index", "sampling_method"), ("scheduler",)
    ),
    **dict.fromkeys(
        ("denoising_strength", "denoise", "prompt_strength", "image_strength"), ("strength",)
    ),
    **dict.fromkeys(
        ("init_image", "init_images", "input_image", "source_image", "image_url", "images"),
        ("image",),
    ),
    **dict.fromkeys(("mask", "mask_url", "latent_mask", "inpaint_mask"), ("mask_image",)),
    **dict.fromkeys(("inpaint_full_res_padding", "mask_padding"), ("padding_mask_crop",)),
    **dict.fromkeys(
        ("lora", "loras", "lora_name", "lora_scale", "adapter", "adapters"), ("lora_weights",)
    ),
    **dict.fromkeys(("embedding", "embeddings", "textual_inversion"), ("textual_inversions",)),
    **dict.fromkeys(("negative", "neg_prompt", "n_prompt", "uc"), ("negative_prompt",)),
    **dict.fromkeys(("text", "input", "inputs", "positive_prompt", "caption"), ("prompt",)),
    **dict.fromkeys(("format", "response_format", "image_format"), ("output_format",)),
    **dict.fromkeys(("noise_seed", "random_seed", "manual_seed"), ("seed",)),
    "w": ("width",),
    "h": ("height",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
    # The same for the keys of one LoRA or textual inversion.
    **dict.fromkeys(("weight", "strength_model", "multiplier", "alpha"), ("scale",)),
    **dict.fromkeys(("path", "file", "filename", "id", "model", "model_name", "tag"), ("name",)),
    **dict.fromkeys(("word", "trigger", "trigger_word", "keyword", "placeholder"), ("token",)),
}

_STEP_CACHES = {
    "faster_cache": "FasterCacheConfig",
    "first_block_cache": "FirstBlockCacheConfig",
    "mag_cache": "MagCacheConfig",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcastConfig",
    "sea_cache": "SeaCacheConfig",
    "taylorseer_cache": "TaylorSeerCacheConfig",
    "text_kv_cache": "TextKVCacheConfig",
}


def resolve_pipeline_class(
    value: str | type[DiffusionPipeline] | None,
) -> type[DiffusionPipeline]:
    """Returns a pipeline class; ``None`` gives ``DiffusionPipeline``, which reads the index.

    Raises:
        InvalidOption: 400, not a pipeline class that diffusers exports.
    """
    import diffusers

    if value is None:
        return diffusers.DiffusionPipeline  # type: ignore[no-any-return]
    found = value if isinstance(value, type) else exported_class(value)
    # The AutoPipelines have `from_pretrained`, but share no base class with pipelines.
    if found is None or not hasattr(found, "from_pretrained") or not hasattr(found, "config_name"):
        raise InvalidOption(
            "pipeline_class", value, "a pipeline class, or the name of one that diffusers exports"
        )
    return found


def resolve_scheduler_class(value: str | type[SchedulerMixin]) -> type[SchedulerMixin]:
    """Returns a scheduler class.

    Raises:
        InvalidOption: 400, not a scheduler class that diffusers exports.
    """
    from diffusers import SchedulerMixin

    found = value if isinstance(value, type) else exported_class(value)
    if found is None or not issubclass(found, SchedulerMixin):
        raise InvalidOption(
            "scheduler_class",
            value,
            "a scheduler class, or the name of one that diffusers exports, "
            "such as 'EulerDiscreteScheduler'",
        )
    return found


# For distilled models. They accept the config of any noise scheduler, but none lists them.
# Not FlowMatchLCMScheduler: pipelines give it no generator, so no seed repeats an image.
_DISTILLED = ("LCMScheduler", "TCDScheduler")


def fitting_schedulers(base: SchedulerMixin) -> dict[str, type[SchedulerMixin]]:
    """Returns the classes, by name, that accept the config of a model's scheduler."""
    compatible = [
        cls for cls in getattr(base, "compatibles", ()) if not _compat.missing_backends(cls)
    ]
    fitting = {cls.__name__: cls for cls in (*compatible, type(base))}
    if "EulerDiscreteScheduler" in fitting:
        fitting |= {name: resolve_scheduler_class(name) for name in _DISTILLED}
    return fitting


def missing_packages(name: object) -> str:
    """Returns the packages that a class of diffusers needs and that are not installed, if any."""
    found = exported_class(name) if isinstance(name, str) else name
    return " and ".join(_compat.missing_backends(found))


def find_sampler(name: str) -> tuple[str, dict[str, Any]] | None:
    """Returns class name and config for a sampler's name, ignoring case."""
    found = {sampler.lower(): choice for sampler, choice in SAMPLERS.items()}
    return found.get(name.lower())


def name_sampler(class_name: str, config: Mapping[str, Any]) -> str:
    """Returns the sampler's name for a scheduler; if it has none, the name of its class."""
    for sampler, (name, changes) in SAMPLERS.items():
        if name == class_name and all(config.get(key) == value for key, value in changes.items()):
            sigmas = [suffix for suffix, flag in SIGMAS.items() if config.get(flag)]
            return " ".join([sampler, *sigmas])
    return class_name


def suggest_field(name: str, known: Collection[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for a field that does not exist, else an empty string.

    Other APIs' names come first, then near matches; ``cfgScale`` and ``cfg-scale`` are read as
    ``cfg_scale``.
    """
    short = name[:_LONGEST_NAME]
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", short).lower()
    for candidate in (snake, snake.removeprefix("lora_").removeprefix("adapter_")):
        meant = [candidate, *FIELD_ALIASES.get(candidate, ())]
        fitting = [one for one in meant if one in known and one != name]
        if fitting:
            return f" (did you mean {' and '.join(map(repr, fitting))}?)"
    return suggest(snake, known)


def resolve_dtype(
    value: str | torch.dtype | None, option: str = "torch_dtype"
) -> torch.dtype | None:
    """Returns a ``torch.dtype``, also from a string such as ``"float16"`` or ``"torch.bfloat16"``.

    Raises:
        InvalidOption: 400, not a floating dtype.
    """
    import torch

    if value is None:
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidOption(option, value, "a floating dtype such as 'float16'")
    return dtype


def resolve_quantization(value: Any) -> Any:
    """Returns diffusers' ``PipelineQuantizationConfig``, also from a mapping of its arguments.

    Raises:
        InvalidOption: 400, invalid arguments.
    """
    from diffusers import PipelineQuantizationConfig

    if value is None or isinstance(value, PipelineQuantizationConfig):
        return value
    try:
        return PipelineQuantizationConfig(**value)
    except (TypeError, ValueError, ImportError) as err:
        raise InvalidOption(
            "quantization_config", value, f"arguments of PipelineQuantizationConfig: {err}"
        ) from err


def resolve_step_cache(name: object) -> type[Any]:
    """Returns diffusers' config class of a step cache.

    Raises:
        InvalidOption: 400, no such cache.
    """
    import diffusers

    names = {cache: cls for cache, cls in _STEP_CACHES.items() if cls in dir(diffusers)}
    if name not in names:
        raise InvalidOption("step_cache", name, f"one of {', '.join(names)}")
    found: type[Any] = getattr(diffusers, names[str(name)])
    return found


def task_class(cls: type[DiffusionPipeline], task: str) -> type[DiffusionPipeline]:
    """Returns the class that does ``task`` with the components of ``cls``.

    Raises:
        InvalidRequest: 400, diffusers has no such task for this family of models.
    """
    for base in cls.__mro__ if task in _compat.AUTO_TASKS else ():
        found = _compat.find_task_class(task, base.__name__)
        if found is not None:
            return found
    if task == "inpaint" and "mask_image" in inspect.signature(cls.__call__).parameters:
        return cls  # such as Flux Fill, whose only task is the one asked for
    raise InvalidRequest("task", task, f"a task that {cls.__name__} can do")


def is_modular_class(value: str | type[Any] | None) -> bool:
    """True for diffusers' ``ModularPipeline``, its subclasses, and their names."""
    if value is None:
        return False
    from diffusers import ModularPipeline

    found = value if isinstance(value, type) else exported_class(value)
    return found is not None and issubclass(found, ModularPipeline)


def modular_class_of(index: Mapping[str, Any]) -> type[ModularPipeline] | None:
    """Returns the modular class for the index of a classic pipeline, if there is one."""
    name = _compat.find_modular_class(index)
    return None if name is None else exported_class(name)


def resolve_blocks_class(
    name: str, module: str = "diffusers"
) -> type[ModularPipelineBlocks] | None:
    """Returns diffusers' class of blocks with a name, if there is one."""
    from diffusers.modular_pipelines import ModularPipelineBlocks

    if module == "diffusers":
        found = exported_class(name)
    elif module.startswith("diffusers.modular_pipelines."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None
    else:
        return None
    is_blocks = isinstance(found, type) and issubclass(found, ModularPipelineBlocks)
    return found if is_blocks else None


def is_component_class(library: str, class_name: str) -> bool:
    """True if an index may name this class, since diffusers imports what an index names."""
    from diffusers import pipelines

    if not all(part.isidentifier() for part in (*library.split("."), class_name)):
        return False
    inside = getattr(getattr(pipelines, library, None), "__name__", "")
    is_known = library.split(".")[0] in ("diffusers", "transformers")
    return (is_known or inside.startswith("diffusers.")) and not class_name.startswith("_")


def is_never_loaded(index: Mapping[str, Any], component: str) -> bool:
    """True if diffusers' loader skips a component that the index names.

    It skips arguments of the pipeline's class that have a default and are not listed as
    optional, such as the scheduler of ``LongCatAudioDiTPipeline`` (diffusers 0.42.1).
    """
    name = index["_class_name"]
    found = exported_class(name) if isinstance(name, str) else None
    parameter = inspect.signature(found.__init__).parameters.get(component) if found else None
    has_default = parameter is not None and parameter.default is not inspect.Parameter.empty
    return has_default and component not in _compat.optional_components(found)


def find_moved_library(library: str, class_name: str) -> str | None:
    """Returns the real library of a class that is not where an index says.

    ``None`` if the index is right, or the class does not exist. The models of deprecated
    pipelines were moved (diffusers 0.42.1), and saved ones name a library without them.
    """
    import diffusers

    if library not in ("deprecated", "diffusers", *_deprecated_pipelines()):
        return None
    if class_name in dir(diffusers):
        return None if library == "diffusers" else "diffusers"
    if class_name in dir(diffusers.schedulers):
        return "diffusers.schedulers"
    for name in _deprecated_pipelines():
        module = getattr(diffusers.pipelines.deprecated, name, None)
        if module is not None and class_name in dir(module):
            return str(
                getattr(module, class_name).__module__
            )  # it exports the loaders' base classes, too
    return None


@functools.lru_cache(maxsize=1)
def _deprecated_pipelines() -> tuple[str, ...]:
    from diffusers.pipelines import deprecated

    return tuple(module.name for module in pkgutil.iter_modules(deprecated.__path__))


def component_class(library: str, class_name: str) -> type[Any] | None:
    """Returns the class that an index names; ``None`` if it is in neither library."""
    from diffusers import pipelines

    if not is_component_class(library, class_name):
        return None
    module = getattr(pipelines, library, None) or importlib.import_module(library)
    return getattr(module, class_name, None)


@functools.lru_cache(maxsize=256)
def exported_class(name: str) -> type[Any] | None:
    """Finds ``Name``, ``diffusers.Name`` or ``diffusers.<anything>.Name`` in its exports."""
    import diffusers

    module, _, short = name.rpartition(".")
    if module and module.split(".")[0] != "diffusers":
        return None
    if short.startswith("_") or short not in dir(diffusers):
        return None
    found = getattr(diffusers, short)
    return found if isinstance(found, type) else None
