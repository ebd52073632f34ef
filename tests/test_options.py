import dataclasses
import inspect

import pytest
import torch

from bentoml_diffusers import ModelOptions, RequestLimits, errors, load_model, options

SAMPLES = {
    "pipeline_class": "StableDiffusionImg2ImgPipeline",
    "device_map": "balanced",
    "custom_pipeline": "stable_diffusion_mega",
    "scheduler_class": "EulerDiscreteScheduler",
    "torch_dtype": "bfloat16",
    "low_cpu_mem_usage": False,
    "enable_xformers": True,
    "enable_attention_slicing": "max",
    "enable_model_cpu_offload": True,
    "enable_sequential_cpu_offload": True,
    "enable_torch_compile": True,
    "variant": "fp16",
    "lora_weights": ["one.safetensors"],
    "textual_inversions": ["word.safetensors"],
    "load_pretrained_extra_kwargs": {"safety_checker": None},
    "lora_dir": "loras",
    "adapter_sources": ("store",),
    "lora_slots": 3,
    "max_lora_rank": 32,
    "lora_cache_bytes": 0,
    "embedding_slots": 5,
    "check_finite": False,
    "allow_partial_lora": True,
    "fuse_static_loras": True,
    "trust_remote_code": True,
    "partial_kwargs": {"__call__": {"num_inference_steps": 2}},
    "offload": "group",
    "offload_arguments": {"offload_type": "leaf_level"},
    "attention_backend": "_native_math",
    "enable_vae_slicing": True,
    "enable_vae_tiling": True,
    "channels_last": True,
    "quantization_config": {"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}},
    "layerwise_casting": "float8_e4m3fn",
    "step_cache": {"name": "first_block_cache", "threshold": 0.1},
    "modular_workflow": "text2image",
}


class Spy:
    """Stands where the pipeline's class stands and remembers what reaches it."""

    config_name = "model_index.json"

    def __init__(self):
        self.loaded = {}
        self.called = {}
        self.scheduler = type("Scheduler", (), {"config": {"num_train_timesteps": 10}})()
        self.unet = torch.nn.Linear(1, 1)
        self.components = {"unet": self.unet}

    def from_pretrained(self, folder, **arguments):
        self.loaded = arguments
        return self

    def __getattr__(self, name):
        if name.startswith(("enable_", "load_", "to")):
            return lambda *args, **kwargs: self.called.setdefault(name, (args, kwargs))
        raise AttributeError(name)


def arrivals(spy):
    """What each option turned into, by its name."""
    return {
        "device_map": spy.loaded.get("device_map") == "balanced",
        "torch_dtype": spy.loaded.get("dtype") is torch.bfloat16,
        "low_cpu_mem_usage": spy.loaded.get("low_cpu_mem_usage") is False,
        "variant": spy.loaded.get("variant") == "fp16",
        "load_pretrained_extra_kwargs": "safety_checker" in spy.loaded
        or spy.loaded.get("use_auth") == "x",
        "scheduler_class": type(spy.scheduler).__name__ == "EulerDiscreteScheduler",
        "enable_xformers": "enable_xformers_memory_efficient_attention" in spy.called,
        "enable_attention_slicing": spy.called.get("enable_attention_slicing") == (("max",), {}),
        "enable_model_cpu_offload": "enable_model_cpu_offload" in spy.called,
        "enable_sequential_cpu_offload": "enable_sequential_cpu_offload" in spy.called,
        "enable_torch_compile": spy.unet._compiled_call_impl is not None,
    }


@pytest.mark.parametrize("name", sorted(arrivals(Spy())))
def test_each_loading_option_arrives(name, model, monkeypatch):
    from bentoml_diffusers import _names

    spy = Spy()
    monkeypatch.setattr(_names, "resolve_pipeline_class", lambda value: spy)
    value = {"use_auth": "x"} if name == "load_pretrained_extra_kwargs" else SAMPLES[name]
    load_model(model, **{name: value})
    assert arrivals(spy)[name]
    assert [other for other, there in arrivals(spy).items() if there] == [name]


def test_there_is_a_sample_for_each_option():
    assert set(SAMPLES) == set(options.option_names())


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_precedence_is_call_then_stored_then_default(name):
    stored = ModelOptions(**{name: SAMPLES[name]})
    default = getattr(ModelOptions(), name)
    assert getattr(stored.overridden_by(ModelOptions()), name) == SAMPLES[name]
    assert getattr(ModelOptions().overridden_by(stored), name) == SAMPLES[name]
    assert getattr(ModelOptions().overridden_by(ModelOptions()), name) == default


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_what_is_stored_comes_back(name):
    plain = ModelOptions(**{name: SAMPLES[name]}).to_dict()
    assert set(plain) == {name}
    assert ModelOptions.from_mapping(plain).to_dict() == plain


def test_classes_and_dtypes_are_stored_by_name():
    from diffusers import EulerDiscreteScheduler

    given = ModelOptions(scheduler_class=EulerDiscreteScheduler, torch_dtype=torch.float16)
    assert given.to_dict()["torch_dtype"] == "float16"
    assert given.to_dict()["scheduler_class"].endswith("EulerDiscreteScheduler")


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"torch_dtyp": "float16"}, "torch_dtyp.*torch_dtype"),
        ({"enable_torch_compile": "yes"}, "enable_torch_compile"),
        ({"partial_kwargs": [1]}, "partial_kwargs"),
        ({"adapter_sources": ("web",)}, "adapter_sources"),
        ({"lora_slots": 0}, "lora_slots"),
        ({"max_lora_rank": True}, "max_lora_rank"),
        ({"lora_cache_bytes": "1 GB"}, "lora_cache_bytes"),
        ({"embedding_slots": 2.5}, "embedding_slots"),
        ({"check_finite": 1}, "check_finite"),
        (
            {"enable_model_cpu_offload": True, "enable_sequential_cpu_offload": True},
            "enable_sequential_cpu_offload",
        ),
    ],
)
def test_bad_options_are_named(values, option, model):
    with pytest.raises(errors.InvalidOption, match=option):
        model.with_options(**values)


def test_options_never_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelOptions().variant = "fp16"


def test_load_model_has_the_arguments_of_bentoml_in_their_order(model):
    names = list(inspect.signature(load_model).parameters)
    assert names[:4] == ["bento_model", "device_id", "pipeline_class", "device_map"]
    assert {"lora_weights", "textual_inversions", "load_pretrained_extra_kwargs"} < set(names)
    pipeline = load_model(model, None, "StableDiffusionImg2ImgPipeline")
    assert type(pipeline).__name__ == "StableDiffusionImg2ImgPipeline"


def test_limits_are_whole_numbers():
    with pytest.raises(errors.InvalidOption, match="max_steps"):
        RequestLimits(max_steps=0)
