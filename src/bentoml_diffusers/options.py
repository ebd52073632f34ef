"""Every option once: how a stored model is loaded and run, and what a request may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from bentoml.models import ModelOptions as _BentoModelOptions

from bentoml_diffusers.errors import InvalidOption

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig, SchedulerMixin

AdapterSpec: TypeAlias = "str | Mapping[str, Any]"
Offload = Literal["none", "model", "sequential", "group"]
AdapterSource = Literal["store", "lora_dir", "path", "hub"]
ADAPTER_SOURCES: tuple[str, ...] = get_args(AdapterSource)
MAX_SEED = 2**32 - 1  # what NumPy takes, too


@dataclass(frozen=True, kw_only=True, eq=True)
class ModelOptions(_BentoModelOptions):  # type: ignore[misc]
    """How a stored pipeline is loaded and run.

    ``Model.with_options``, ``load_model``, ``Engine.from_model`` and the stored model itself all
    speak this one list. ``None`` means: not given, the next source decides (call, then stored
    with the model, then the default in parentheses).

    Attributes:
        pipeline_class: A class, or the name of one that diffusers exports
            (the class that the model's index names).
        device_map: As in diffusers' ``from_pretrained`` (no map).
        custom_pipeline: ``"stable_diffusion_mega"`` or ``"score_sde_vp"``, which come with this
            package, or code: a file, a folder with ``pipeline.py``, or a name on the hub; code
            needs ``trust_remote_code=True`` (the code stored with the model, if there is some).
        scheduler_class: A class, or the name of one that diffusers exports; built from the
            config of the stored scheduler (the stored scheduler).
        torch_dtype: A ``torch.dtype`` or its name, such as ``"float16"`` (float32; for a runner
            on a GPU float16, as in ``bentoml.diffusers``).
        low_cpu_mem_usage: Load weights without initialising them first (``True``).
        enable_xformers: Memory-efficient attention of xformers (for a runner on a GPU, on if
            xformers is installed; else off).
        enable_attention_slicing: ``"auto"``, ``"max"`` or a slice size (off).
        enable_model_cpu_offload: Keep on the GPU only the module that runs (off).
        enable_sequential_cpu_offload: Keep on the GPU only the layer that runs (off).
        enable_torch_compile: Compile the denoiser, whatever it is called: ``True`` or ``"whole"``;
            or ``"blocks"``, each kind of repeated block once, which starts sooner (off).
        variant: Load the files of that variant, such as ``"fp16"`` (the variant imported).
        lora_weights: LoRAs that are always active: a name, a mapping, or a list of either.
        textual_inversions: Textual inversions that are always loaded, in the same forms.
        load_pretrained_extra_kwargs: More arguments for ``from_pretrained``.
        lora_dir: Folder of LoRA files that requests may name (of a runner: the working directory).
        adapter_sources: Where a *request's* names may lead: ``"store"``, ``"lora_dir"``;
            ``"path"`` opens every file of the machine, ``"hub"`` every repository
            (``("store", "lora_dir")``).
        lora_slots: LoRAs of requests that can be on the device at once, 1 to 1024 (8). Memory is
            taken for a layer when the first LoRA touches it.
        max_lora_rank: Largest rank of a request's LoRA, 1 to 1024 (128). Slots grow to it in
            steps; a LoRA beyond it is refused.
        lora_cache_bytes: Host memory for LoRAs and embeddings that were read, in bytes, from 0
            (1 GiB).
        embedding_slots: Vectors of requests' inversions for each text encoder, 1 to 65536 (256).
        check_finite: Refuse a request's LoRA or embedding that holds NaN or infinity (``True``).
        allow_partial_lora: Take a LoRA that fits only in part; warnings of the result say so (off).
        fuse_static_loras: Add ``lora_weights`` to the base weights instead of keeping them apart:
            faster, rounded once in the weights' dtype (``False``).
        trust_remote_code: Run pipeline code that comes with a model; never stored (``False``: only
            code that was trusted when it was imported into this store).
        partial_kwargs: For each method, arguments that a call gets unless it gives them itself.
        offload: ``"none"``, ``"model"``, ``"sequential"`` or ``"group"``: what waits on the CPU
            while it does not run; the first two names above say the same (``"none"``).
        offload_arguments: For ``"group"``: arguments of diffusers' ``enable_group_offload``
            (``{"offload_type": "leaf_level"}``).
        attention_backend: Kernel for attention by its name in diffusers, such as ``"flash"`` or
            ``"_native_math"`` (``"native"``).
        enable_vae_slicing: Decode the images of a request one by one (off).
        enable_vae_tiling: Decode large images tile by tile (off).
        channels_last: Put the channels of convolution weights last (off).
        quantization_config: diffusers' ``PipelineQuantizationConfig``, or its arguments (none).
        layerwise_casting: Dtype to keep the denoiser's weights in, such as
            ``"float8_e4m3fn"``; they are cast where they are used (none).
        step_cache: Reuse of earlier steps by its name, such as ``"first_block_cache"``, or
            ``{"name": ..., setting: value}``; images change a little (none).
        modular_workflow: Of a modular pipeline only this part, such as ``"text2image"``, with only
            the components that it needs (the whole pipeline).
    """

    pipeline_class: str | type[DiffusionPipeline] | None = None
    device_map: str | Mapping[str, Any] | None = None
    custom_pipeline: str | None = None
    scheduler_class: str | type[SchedulerMixin] | None = None
    torch_dtype: str | torch.dtype | None = None
    low_cpu_mem_usage: bool | None = None
    enable_xformers: bool | None = None
    enable_attention_slicing: int | str | None = None
    enable_model_cpu_offload: bool | None = None
    enable_sequential_cpu_offload: bool | None = None
    enable_torch_compile: bool | Literal["whole", "blocks"] | None = None
    variant: str | None = None
    lora_weights: AdapterSpec | Sequence[AdapterSpec] | None = None
    textual_inversions: AdapterSpec | Sequence[AdapterSpec] | None = None
    load_pretrained_extra_kwargs: Mapping[str, Any] | None = None
    lora_dir: str | None = None
    adapter_sources: tuple[AdapterSource, ...] | None = None
    lora_slots: int | None = None
    max_lora_rank: int | None = None
    lora_cache_bytes: int | None = None
    embedding_slots: int | None = None
    check_finite: bool | None = None
    allow_partial_lora: bool | None = None
    fuse_static_loras: bool | None = None
    trust_remote_code: bool | None = None
    partial_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    offload: Offload | None = None
    offload_arguments: Mapping[str, Any] | None = None
    attention_backend: str | None = None
    enable_vae_slicing: bool | None = None
    enable_vae_tiling: bool | None = None
    channels_last: bool | None = None
    quantization_config: Mapping[str, Any] | PipelineQuantizationConfig | None = None
    layerwise_casting: str | torch.dtype | None = None
    step_cache: str | Mapping[str, Any] | None = None
    modular_workflow: str | None = None

    def __post_init__(self) -> None:
        for name in _BOOLEANS:
            _check(name, getattr(self, name), bool, "true or false")
        for name in _TEXTS:
            _check(name, getattr(self, name), str, "text")
        for name, (low, high) in _WHOLE_NUMBERS.items():
            _check_whole_number(name, getattr(self, name), low, high)
        _check("partial_kwargs", self.partial_kwargs, Mapping, "{method: {argument: value}}")
        _check("offload_arguments", self.offload_arguments, Mapping, "{argument: value}")
        for name, values in _CHOICES.items():
            _check_choice(name, getattr(self, name), values)
        if self.step_cache is not None and not isinstance(self.step_cache, (str, Mapping)):
            raise InvalidOption("step_cache", self.step_cache, "a name, or a mapping with one")
        if self.enable_model_cpu_offload and self.enable_sequential_cpu_offload:
            raise InvalidOption(
                "enable_sequential_cpu_offload", True, "only one kind of CPU offload"
            )
        if self.adapter_sources is not None:
            _check_adapter_sources(self.adapter_sources)
            object.__setattr__(self, "adapter_sources", tuple(self.adapter_sources))

    @property
    def offload_kind(self) -> Offload:
        """What waits on the CPU, by whichever name it was given."""
        if self.offload is not None:
            return self.offload
        if self.enable_sequential_cpu_offload:
            return "sequential"
        return "model" if self.enable_model_cpu_offload else "none"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelOptions:
        """Makes options from a mapping.

        Raises:
            InvalidOption: 400, an unknown name or a wrong value.
        """
        known = option_names()
        for name in values:
            if name not in known:
                raise InvalidOption.unknown(name, known)
        return cls(**values)

    def with_options(self, **values: Any) -> ModelOptions:
        """Returns a copy with other values.

        Raises:
            InvalidOption: 400, an unknown name or a wrong value.
        """
        return ModelOptions.from_mapping({**self.given(), **values})

    def overridden_by(self, other: ModelOptions) -> ModelOptions:
        """Returns these options with all that ``other`` gives: call over stored over default."""
        return replace(self, **other.given())

    def given(self) -> dict[str, Any]:
        """Returns only what was given: all that differs from the default."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if getattr(self, item.name) != _default(item)
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns what was given as plain values that YAML and JSON can hold."""
        return {name: _plain(value) for name, value in self.given().items()}


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for; beyond it a request is refused with 400.

    What a request leaves out is within them, too: where a default of the model is beyond them, a
    service does not start unless ``default_steps`` or ``default_side`` says what it gets.

    Attributes:
        max_side: Largest height and width, in pixels.
        max_pixels: Largest height x width, in pixels, of an image that comes or is asked for.
        max_steps: Largest number of denoising steps.
        max_prompt_chars: Longest prompt, in characters.
        max_images: Largest number of images of one request.
        max_frames: Most frames of a video, one that comes or is asked for.
        max_pixel_frames: Largest height x width x frames of a video.
        max_seconds: Longest video that comes, and sound that comes or is asked for.
        max_upload_bytes: Largest uploaded file, in bytes.
        max_open_upload_bytes: Bytes of all bodies that a worker reads at once; beyond it 503.
        default_steps: Denoising steps of a request that gives none (what class or blocks say).
        default_side: Height and width of a request that gives neither and starts from no image,
            in pixels, a multiple of 8 (what the model was trained for).
    """

    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    max_steps: int = 150
    max_prompt_chars: int = 2000
    max_images: int = 10
    max_frames: int = 257
    max_pixel_frames: int = 1280 * 720 * 257
    max_seconds: int = 120
    max_upload_bytes: int = 32 * 1024 * 1024
    max_open_upload_bytes: int = 256 * 1024 * 1024
    default_steps: int | None = None
    default_side: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            is_given = value is not None or item.default is not None
            if is_given and (not isinstance(value, int) or value < 1):
                raise InvalidOption(item.name, value, "an integer from 1")
        if self.default_steps is not None:
            self.check_default_steps(self.default_steps)
        if self.default_side is not None:
            if self.default_side % 8:
                raise InvalidOption("default_side", self.default_side, "a multiple of 8")
            self.check_default_size(self.default_side, self.default_side)

    def check_default_steps(self, steps: int) -> None:
        """Raises InvalidOption (400) where a request that gives no steps would be beyond them."""
        if steps > self.max_steps:
            raise InvalidOption(
                "max_steps",
                self.max_steps,
                f"at least {steps}, the steps of a request that gives none; "
                "or a default_steps up to max_steps beside it",
            )

    def check_default_size(self, height: int, width: int) -> None:
        """Raises InvalidOption (400) where a request that gives no size would be beyond them."""
        for name, least in {"max_side": max(height, width), "max_pixels": height * width}.items():
            if getattr(self, name) < least:
                expected = f"at least {least}: a request without a size makes {width} x {height}"
                next_step = "pixels; or a default_side within the limits beside it"
                raise InvalidOption(name, getattr(self, name), f"{expected} {next_step}")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What a service writes into the images that it answers with.

    Nothing, unless it is switched on: who passes an image on passes on the prompt in it, and the
    images that went in.

    Attributes:
        workflow: The workflow, which replays the image; the header ``x-workflow`` of the answer
            says whether it is in there.
        infotext: The text that AUTOMATIC1111's web UI writes, and many tools read.
        max_workflow_bytes: Largest workflow, images that went in included as base64, in bytes, up
            to 48 MiB; a larger one is left out.
    """

    workflow: bool = False
    infotext: bool = False
    max_workflow_bytes: int = 16 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("workflow", "infotext"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOption(name, getattr(self, name), "true or false")
        _check_whole_number("max_workflow_bytes", self.max_workflow_bytes, 0, 48 * 1024 * 1024)


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much an engine takes on at once.

    Attributes:
        max_running: Requests that run side by side, each with its own latents on the device. An
            eighth (from 4 on, at least 1) is for callers that have none, and for small requests.
        max_queue: Requests that may wait; beyond it a request is refused with 429.
        max_pixel_steps: Work that may wait: pixels times images times steps, summed over all
            waiting requests. One request of each caller always may.
        max_batch_rows: Largest batch of a denoiser or text encoder, in rows; guidance takes two
            rows for an image. What is worth its time is measured, this is only a bound.
        max_decode_rows: Largest batch of the autoencoder, in images.
        timeout_s: Seconds, waiting included, after which a request that gives none is stopped;
            ``None``: never. A service takes a little less than its ``traffic.timeout``.
    """

    max_running: int = 32
    max_queue: int = 128
    max_pixel_steps: int = 10**11
    max_batch_rows: int = 64
    max_decode_rows: int = 4
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "timeout_s":
                _check_whole_number(item.name, getattr(self, item.name), 1, 10**15)
        seconds: object = self.timeout_s
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and seconds > 0):  # type: ignore[operator]
            raise InvalidOption("timeout_s", seconds, "a number of seconds above 0")


def option_names() -> tuple[str, ...]:
    """Returns the names of all model options, in their order."""
    return tuple(item.name for item in fields(ModelOptions))


_BOOLEANS = (
    "low_cpu_mem_usage",
    "enable_xformers",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_vae_slicing",
    "enable_vae_tiling",
    "channels_last",
    "check_finite",
    "allow_partial_lora",
    "fuse_static_loras",
    "trust_remote_code",
)

_TEXTS = ("custom_pipeline", "variant", "lora_dir", "attention_backend", "modular_workflow")

_CHOICES: Mapping[str, tuple[str | bool, ...]] = {
    "offload": get_args(Offload),
    "enable_torch_compile": (True, False, "whole", "blocks"),
}

_WHOLE_NUMBERS = {
    "lora_slots": (1, 1024),
    "max_lora_rank": (1, 1024),
    "lora_cache_bytes": (0, 2**50),
    "embedding_slots": (1, 2**16),
}


def _check(name: str, value: object, kind: type, expected: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise InvalidOption(name, value, expected)


def _check_choice(name: str, value: object, choices: Sequence[str | bool]) -> None:
    if value is not None and not any(value is one or value == one for one in choices):
        raise InvalidOption(name, value, f"one of {', '.join(map(repr, choices))}")


def _check_whole_number(name: str, value: object, low: int, high: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_integer and low <= value <= high):  # type: ignore[operator]
        raise InvalidOption(name, value, f"an integer from {low} to {high}")


def _check_adapter_sources(sources: Sequence[str]) -> None:
    for source in sources:
        if source not in ADAPTER_SOURCES:
            raise InvalidOption("adapter_sources", source, f"a tuple of {ADAPTER_SOURCES!s}")


def _default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "quant_backend"):  # PipelineQuantizationConfig
        names = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
        given = {name: getattr(value, name, None) for name in names}
        return {name: _plain(item) for name, item in given.items() if item}
    return str(value).removeprefix("torch.")
