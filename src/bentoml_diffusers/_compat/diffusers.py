"""Corners of diffusers' pipelines and models. This module does not load it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

# The method of a pipeline that looks at its arguments, and first parameters of decoders. Until
# diffusers (0.42) has a base class that says so.
CHECKS = "check_inputs"
DECODER_INPUTS = ("z", "x", "latents", "latent", "h")
# Decoders that take a generator and never use it. Until their signatures (0.42) lack it.
DETERMINISTIC_DECODERS = ("AutoencoderKL", "AutoencoderTiny")

_AUTO_MAPPINGS = {
    "txt2img": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "text2img": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",  # as the mega pipeline calls it
    "img2img": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "inpaint": "AUTO_INPAINT_PIPELINES_MAPPING",
    "txt2video": "AUTO_TEXT2VIDEO_PIPELINES_MAPPING",  # this and those below from 0.42 on
    "img2video": "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING",
    "video2video": "AUTO_VIDEO2VIDEO_PIPELINES_MAPPING",
    "txt2audio": "AUTO_TEXT2AUDIO_PIPELINES_MAPPING",
}
AUTO_TASKS = tuple(_AUTO_MAPPINGS)


def execution_device(pipeline: Any) -> torch.device:
    """Returns where a pipeline computes, also while its modules are offloaded; the CPU if unknown.

    Until diffusers (0.42) tells it in public.
    """
    import torch

    device = getattr(pipeline, "_execution_device", None) or getattr(pipeline, "device", None)
    return torch.device(device or "cpu")


def fix_execution_device(pipeline: Any) -> None:
    """Notes where a pipeline runs, by a subclass of its class.

    Until diffusers (0.42) looks for it without a walk over all modules, which takes milliseconds,
    at each call, and at each block of a modular pipeline.
    """
    cls = type(pipeline)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    fixed = {"_execution_device": pipeline._execution_device, **names}
    pipeline.__class__ = type(cls.__name__, (cls,), fixed)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of a model's method, also behind diffusers' ``apply_forward_hook``.

    Until diffusers 0.42 is the lowest: the wrapper of 0.41 tells of ``*args`` and ``**kwargs``.
    """
    wrapper = getattr(function, "__func__", None)
    if wrapper is not None and wrapper.__qualname__ == "apply_forward_hook.<locals>.wrapper":
        method = inspect.getclosurevars(wrapper).nonlocals["method"]
        function = method.__get__(function.__self__)  # type: ignore[attr-defined]
    return inspect.signature(function)


def find_task_class(task: str, class_name: str) -> type[Any] | None:
    """Returns the class that does one of ``AUTO_TASKS`` for a family; ``None`` if there is none.

    Until ``AutoPipelineForText2Image`` and its like (0.42) tell the class without a model.
    """
    from diffusers.pipelines import auto_pipeline

    mapping = getattr(auto_pipeline, _AUTO_MAPPINGS[task], {})
    found: type[Any] | None = auto_pipeline._get_task_class(
        mapping, class_name, throw_error_if_not_exist=False
    )
    return found


def missing_backends(cls: object) -> Sequence[str]:
    """Returns the packages that a class needs and that are not installed.

    diffusers exports a stand-in for such a class. Until it (0.42) tells in public what is missing.
    """
    backends: Sequence[str] = getattr(cls, "_backends", ())
    return backends


def optional_components(cls: object) -> Sequence[str]:
    """Returns the components that a pipeline's class can be without.

    Until diffusers (0.42) tells it in public.
    """
    names: Sequence[str] = getattr(cls, "_optional_components", ())
    return names


def describe_class(component: Any) -> tuple[str, str]:
    """Returns library and class of a component as diffusers writes them into an index.

    Until diffusers (0.42) has a function for it in public.
    """
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    library, class_name = _fetch_class_library_tuple(component)
    return str(library), str(class_name)


def origin_of(pipeline: Any) -> str | None:
    """Returns the repository or folder that a pipeline says it is from.

    Until a modular pipeline (0.42) writes it into its config, as a classic one does.
    """
    found = getattr(pipeline, "_pretrained_model_name_or_path", None)
    return found or pipeline.config.get("_name_or_path")  # type: ignore[no-any-return]


def progress_bar_options(pipeline: Any) -> dict[str, Any]:
    """Returns what ``set_progress_bar_config`` of a pipeline was given.

    Until diffusers (0.42) tells it in public.
    """
    options: dict[str, Any] = getattr(pipeline, "_progress_bar_config", {})
    return options


def is_offloaded(pipeline: Any) -> bool:
    """True if a pipeline moves whole modules at the end of a call.

    By ``enable_model_cpu_offload``, or ``enable_auto_cpu_offload`` of its components manager. Until
    diffusers (0.42) tells it in public.
    """
    manager = getattr(pipeline, "_components_manager", None)
    return bool(
        getattr(pipeline, "_all_hooks", None) or getattr(manager, "_auto_offload_enabled", False)
    )


def latent_unpacker(pipeline: Any) -> Callable[..., torch.Tensor] | None:
    """Returns what makes an image of channels of packed latents, such as Flux's; ``None``: nothing.

    It takes the latents, height, width and ``vae_scale_factor``; that of some videos takes more.
    Until diffusers (0.42) has a public function for it.
    """
    unpack: Callable[..., torch.Tensor] | None = getattr(pipeline, "_unpack_latents", None)
    names = [] if unpack is None else list(inspect.signature(unpack).parameters)
    return unpack if names == ["latents", "height", "width", "vae_scale_factor"] else None


def has_repeated_blocks(model: Any) -> bool:
    """True if ``compile_repeated_blocks`` of a model has something to compile.

    Until it (0.42) says so by an error of its own class.
    """
    return bool(getattr(model, "_repeated_blocks", None))


def takes_attention_backend(processor: Any) -> bool:
    """True if an attention processor heeds ``set_attention_backend`` of its model.

    Until diffusers (0.42) says it where none does, as for the attention of UNets.
    """
    return hasattr(processor, "_attention_backend")


def attention_backend() -> str:
    """Name of the attention kernel that diffusers uses where no module says otherwise.

    Until diffusers (0.42) tells it in public.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend, _ = _AttentionBackendRegistry.get_active_backend()
    return str(backend.value)


def quantization_of(config: Any, *, is_diffusers: bool, component: str) -> Any:
    """Returns how a ``PipelineQuantizationConfig`` quantizes a component; ``None``: not at all.

    Until diffusers (0.42) quantizes the components of a modular pipeline by itself.
    """
    return config._resolve_quant_config(is_diffusers, component)


def make_image_projection(unet: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """Returns the image projection that diffusers makes of the state in an IP-Adapter's file.

    Until diffusers (0.42) saves IP-Adapters.
    """
    return unet._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False)


def lora_components(pipeline: Any) -> Sequence[str]:
    """Returns the names of the components that a pipeline, or its class, loads LoRAs into.

    Until diffusers (0.42) tells it in public.
    """
    names: Sequence[str] = getattr(pipeline, "_lora_loadable_modules", ())
    return names


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Returns PEFT's config for the tensors of a LoRA file, as diffusers' loader makes it.

    Until it (0.42) makes it of tensors without a model.
    """
    from diffusers.utils.peft_utils import get_peft_kwargs

    config: dict[str, Any] = get_peft_kwargs(ranks, alphas, state)
    return config


def reads_lokr(pipeline: Any) -> bool:
    """True if diffusers' own loader of a pipeline's class reads LoKr (0.42: Z-Image and Flux 2).

    Until diffusers says which kinds a class takes.
    """
    return _loader_says(pipeline, "lokr")


def reads_alpha_of_file(pipeline: Any) -> bool:
    """True if diffusers takes a LoRA's alpha from the metadata of its file (0.42: MiniMax-H3).

    Until diffusers reads such metadata of tensors in memory.
    """
    return _loader_says(pipeline, "file_metadata")


def _loader_says(pipeline: Any, word: str) -> bool:
    convert = getattr(pipeline, "lora_state_dict", None)
    return convert is not None and word in inspect.getsource(inspect.unwrap(convert.__func__))
