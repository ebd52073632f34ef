"""Each loading option arrives in a real pipeline, in `load_model` and in a runner alike."""

import diffusers
import pytest
import tiny
import torch

import bentoml_diffusers
from bentoml_diffusers import errors, testing

CALL = {"prompt": "a red circle", "num_inference_steps": 2}
LAST = torch.channels_last
NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def models(tmp_path_factory, pipeline_folder):
    """A model with a UNet, and one with a transformer."""
    folder = tmp_path_factory.mktemp("flux")
    tiny.build("flux").save_pretrained(folder)
    return {
        "sd": bentoml_diffusers.import_model("options-sd", pipeline_folder),
        "flux": bentoml_diffusers.import_model("options-flux", folder),
    }


def has_hook(module):
    return any(hasattr(part, "_diffusers_hook") for part in module.modules())


def is_compiled(module):
    return module._compiled_call_impl is not None


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


ARRIVALS = [
    ("sd", {"torch_dtype": "float16"}, lambda p: p.vae.dtype == torch.float16),
    (
        "sd",
        {"pipeline_class": "StableDiffusionImg2ImgPipeline"},
        lambda p: type(p) is diffusers.StableDiffusionImg2ImgPipeline,
    ),
    (
        "sd",
        {"scheduler_class": "EulerDiscreteScheduler"},
        lambda p: type(p.scheduler) is diffusers.EulerDiscreteScheduler,
    ),
    (
        "sd",
        {"scheduler_class": diffusers.EulerDiscreteScheduler},
        lambda p: type(p.scheduler) is diffusers.EulerDiscreteScheduler,
    ),
    ("sd", {"offload": "group"}, lambda p: has_hook(p.unet) and has_hook(p.vae)),
    (
        "sd",
        {"offload": "group", "offload_arguments": {"exclude_modules": ["vae"]}},
        lambda p: has_hook(p.unet) and not has_hook(p.vae),
    ),
    ("sd", {"offload": "none", "enable_model_cpu_offload": True}, lambda p: not has_hook(p.unet)),
    (
        "sd",
        {"enable_attention_slicing": "max"},
        lambda p: "Sliced" in type(next(iter(p.unet.attn_processors.values()))).__name__,
    ),
    (
        "flux",
        {"attention_backend": "_native_math"},
        lambda p: all(
            item._attention_backend == "_native_math"
            for item in p.transformer.attn_processors.values()
        ),
    ),
    ("sd", {"enable_vae_slicing": True}, lambda p: p.vae.use_slicing),
    ("sd", {"enable_vae_tiling": True}, lambda p: p.vae.use_tiling),
    (
        "sd",
        {"channels_last": True},
        lambda p: p.unet.conv_in.weight.is_contiguous(memory_format=LAST),
    ),
    ("sd", {"enable_torch_compile": True}, lambda p: is_compiled(p.unet)),
    ("flux", {"enable_torch_compile": "whole"}, lambda p: is_compiled(p.transformer)),
    (
        "flux",
        {"enable_torch_compile": "blocks"},
        lambda p: (
            is_compiled(p.transformer.transformer_blocks[0])
            and is_compiled(p.transformer.single_transformer_blocks[0])
            and not is_compiled(p.transformer)
        ),
    ),
    (
        "sd",
        {"layerwise_casting": "float8_e4m3fn"},
        lambda p: torch.float8_e4m3fn in dtypes(p.unet) and dtypes(p.vae) == {torch.float32},
    ),
    ("flux", {"step_cache": "first_block_cache"}, lambda p: p.transformer.is_cache_enabled),
    (
        "flux",
        {"step_cache": {"name": "first_block_cache", "threshold": 0.5}},
        lambda p: getattr(p.transformer._cache_config, "threshold", 0) == 0.5,
    ),
    (
        "flux",
        {"step_cache": "faster_cache"},
        lambda p: hasattr(p.transformer._cache_config, "current_timestep_callback"),
    ),
    (
        "sd",
        {"load_pretrained_extra_kwargs": {"vae": None}},
        lambda p: p.vae is None,
    ),
]
IDS = [f"{kind}-{'-'.join(map(str, options))}-{n}" for n, (kind, options, _) in enumerate(ARRIVALS)]


@pytest.mark.parametrize(("kind", "options", "arrived"), ARRIVALS, ids=IDS)
def test_each_option_arrives(models, kind, options, arrived):
    assert not arrived(bentoml_diffusers.load_model(models[kind])) or "none" in options.values()
    assert arrived(bentoml_diffusers.load_model(models[kind], **options))


RUNNING = [
    ("sd", {"offload": "group"}),
    ("sd", {"channels_last": True, "enable_vae_tiling": True, "enable_vae_slicing": True}),
    ("sd", {"layerwise_casting": "float8_e4m3fn"}),
    ("flux", {"attention_backend": "_native_math"}),
    ("flux", {"step_cache": "first_block_cache"}),
]


@pytest.mark.parametrize(("kind", "options"), RUNNING)
def test_pipelines_with_options_run_in_a_runner(models, kind, options, run_local):
    size = {"height": 32, "width": 32}
    more = {"max_sequence_length": 16} if kind == "flux" else {}
    image = run_local(models[kind], **options)(**CALL, **size, **more, seed=1)[0][0]
    assert image.size == (32, 32)


def test_stored_options_are_used_by_load_model_and_runner(pipeline_folder, name):
    stored = {"scheduler_class": "EulerDiscreteScheduler", "enable_vae_slicing": True}
    model = bentoml_diffusers.import_model(name, pipeline_folder, options=stored)
    loaded = bentoml_diffusers.load_model(name)
    runner = bentoml_diffusers.get(name).to_runner()
    runner.init_local(quiet=True)
    served = runner._runner_handle._runnable.pipeline
    for pipeline in (loaded, served):
        assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler
        assert pipeline.vae.use_slicing
    over = bentoml_diffusers.load_model(model, scheduler_class="DPMSolverMultistepScheduler")
    assert type(over.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert over.vae.use_slicing
    again = model.with_options(scheduler_class="PNDMScheduler")
    assert type(bentoml_diffusers.load_model(again).scheduler) is diffusers.PNDMScheduler


def test_arguments_reach_from_pretrained(models, monkeypatch):
    seen = {}
    load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def spy(cls, folder, **arguments):
        seen.update(arguments)
        arguments.pop("quantization_config")
        arguments.pop("device_map")
        return load(cls, folder, **arguments)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(spy))
    config = {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}
    mapping = diffusers.quantizers.PipelineQuantizationConfig
    monkeypatch.setattr(mapping, "post_init", lambda self: None)  # asks for bitsandbytes itself
    bentoml_diffusers.load_model(
        models["sd"],
        quantization_config=config,
        low_cpu_mem_usage=True,
        device_map="balanced",
    )
    assert isinstance(seen["quantization_config"], mapping)
    assert seen["quantization_config"].quant_backend == "bitsandbytes_8bit"
    assert (seen["low_cpu_mem_usage"], seen["device_map"]) == (True, "balanced")
    assert seen["use_safetensors"] is True
    assert seen["local_files_only"] is True
    assert seen["dtype"] is torch.float32  # quantizers have a default of their own


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("denoiser", "text_encoder"),
    [("float32", "float32"), ("float16", "float32"), ("float32", "float16"), ("bfloat16",) * 2],
)
def test_files_of_any_dtype_become_float32(
    tmp_path, name, denoiser, text_encoder, low_cpu_mem_usage
):
    pipeline = testing.tiny_stable_diffusion()
    pipeline.unet.to(getattr(torch, denoiser))
    pipeline.text_encoder.to(getattr(torch, text_encoder))
    pipeline.save_pretrained(tmp_path)
    bentoml_diffusers.import_model(name, tmp_path)
    loaded = bentoml_diffusers.load_model(name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert dtypes(loaded.unet) == dtypes(loaded.text_encoder) == {torch.float32}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_float32_is_loaded_whatever_torch_has_as_default(models, low_cpu_mem_usage):
    """Another thread that loads in half precision sets the default of this one, too."""
    torch.set_default_dtype(torch.float16)
    try:
        loaded = bentoml_diffusers.load_model(models["sd"], low_cpu_mem_usage=low_cpu_mem_usage)
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes(loaded.unet) == dtypes(loaded.vae) == dtypes(loaded.text_encoder)
    assert dtypes(loaded.unet) == {torch.float32}
    plain = bentoml_diffusers.load_model(models["sd"])
    for one, other in zip(loaded.unet.parameters(), plain.unet.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        ("sd", {"attention_backend": "_native_math"}, errors.UnsupportedByPipeline, "backend"),
        ("flux", {"attention_backend": "fastest"}, errors.InvalidOption, "fastest"),
        ("sd", {"step_cache": "first_block_cache"}, errors.UnsupportedByPipeline, "step_cache"),
        ("flux", {"step_cache": "magic"}, errors.InvalidOption, "first_block_cache"),
        ("flux", {"step_cache": 3}, errors.InvalidOption, "step_cache"),
        (
            "flux",
            {"step_cache": {"name": "first_block_cache", "treshold": 1}},
            errors.InvalidOption,
            "threshold",
        ),
        ("sd", {"layerwise_casting": "int8"}, errors.InvalidOption, "layerwise_casting"),
        ("sd", {"offload": "disk"}, errors.InvalidOption, "sequential"),
        ("sd", {"enable_torch_compile": "some"}, errors.InvalidOption, "blocks"),
        ("sd", {"quantization_config": {"backend": "x"}}, errors.InvalidOption, "quantization"),
        pytest.param(
            "sd",
            {"offload": "model"},
            errors.InvalidOption,
            "offload",
            marks=pytest.mark.skipif(not NO_GPU, reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(models, kind, options, error, words):
    with pytest.raises(error, match=words):
        bentoml_diffusers.load_model(models[kind], **options)


def test_a_vae_option_without_vae_is_refused(name):
    model = bentoml_diffusers.save_model(name, tiny.build("ddpm"))
    with pytest.raises(errors.UnsupportedByPipeline, match="enable_vae_tiling"):
        bentoml_diffusers.load_model(model, enable_vae_tiling=True)
    assert is_compiled(bentoml_diffusers.load_model(model, enable_torch_compile=True).unet)
