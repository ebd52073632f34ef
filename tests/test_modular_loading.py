"""Modular pipelines loaded: IP-Adapters, options, LoRAs, shared components, Mellon nodes."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from bentoml_cli.cli import cli
from click.testing import CliRunner
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import ComponentsManager
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from modular_models import CALL, IMAGE, generate, write_blocks
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import Engine, errors, loading, testing
from bentoml_diffusers.engine.views.exclusivity import exclusive_reason

# IP-Adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A stored pipeline with an IP-Adapter at 0.6, and what it generates with and without it."""
    pipeline = testing.tiny_modular_stable_diffusion_xl(image_encoder=True)
    without = generate(pipeline)
    file = testing.save_tiny_ip_adapter(tmp_path_factory.mktemp("ip"))
    pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    pipeline.set_ip_adapter_scale({"down": 0.6, "up": 0.3})
    with_it = generate(pipeline, ip_adapter_image=IMAGE)
    assert (with_it != without).any()
    return bentoml_diffusers.save_model("adapted", pipeline), with_it, without


def test_an_ip_adapter_comes_back_with_its_scales(adapted):
    model, with_it, without = adapted
    pipeline = bentoml_diffusers.load_model(model)
    assert (generate(pipeline, ip_adapter_image=IMAGE) == with_it).all()
    pipeline.unload_ip_adapter()
    assert (generate(pipeline) == without).all()


def test_a_modular_workflow_without_it_does_not_load_it(adapted):
    model, with_it, without = adapted
    pipeline = bentoml_diffusers.load_model(model, modular_workflow="text2image")
    assert (generate(pipeline) == without).all()
    assert not hasattr(pipeline, "image_encoder")
    pipeline = bentoml_diffusers.load_model(model, modular_workflow="ip_adapter_text2image")
    assert (generate(pipeline, ip_adapter_image=IMAGE) == with_it).all()


def test_an_ip_adapter_that_does_not_fit_is_one_error(adapted, tmp_path, name):
    model = adapted[0]
    other = Path(shutil.copytree(model.path_of("diffusion_model"), tmp_path / "other"))
    shutil.copy(
        other / "vae" / "diffusion_pytorch_model.safetensors",
        other / "ip_adapter" / "00.safetensors",
    )
    broken = bentoml_diffusers.import_model(name, other)
    with pytest.raises(errors.InvalidModel, match="IP-Adapter"):
        bentoml_diffusers.load_model(broken)


def full_face(width):
    from diffusers.models.embeddings import IPAdapterFullImageProjection

    return IPAdapterFullImageProjection(image_embed_dim=16, cross_attention_dim=width)


def plus(width):
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    return IPAdapterPlusImageProjection(
        embed_dims=16, output_dims=width, hidden_dims=64, heads=1, num_queries=4
    )


def face_id(width):
    from diffusers.models.embeddings import IPAdapterFaceIDImageProjection

    return IPAdapterFaceIDImageProjection(16, width, mult=2, num_tokens=4)


@pytest.mark.parametrize("make", [full_face, plus, face_id])
def test_image_projections_of_each_kind_come_back(make, adapted, name):
    pipeline = bentoml_diffusers.load_model(adapted[0])
    layers = pipeline.unet.encoder_hid_proj.image_projection_layers
    layers[0] = make(pipeline.unet.config.cross_attention_dim)
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    again = loaded.unet.encoder_hid_proj.image_projection_layers[0]
    assert type(again) is type(layers[0])
    for key, value in layers[0].state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_an_image_projection_that_would_not_come_back_is_refused(adapted, name):
    pipeline = bentoml_diffusers.load_model(adapted[0])
    pipeline.unet.encoder_hid_proj.image_projection_layers[0] = torch.nn.Linear(2, 2)
    with pytest.raises(errors.InvalidModel, match="unload_ip_adapter"):
        bentoml_diffusers.save_model(name, pipeline)


# Options


@pytest.fixture(scope="module")
def flux():
    pipeline = diffusers.FluxAutoBlocks().init_pipeline()
    parts = testing.tiny_flux().components
    known = pipeline.pretrained_component_names
    pipeline.update_components(**{name: parts[name] for name in known if parts.get(name)})
    return bentoml_diffusers.save_model("modular-flux", pipeline)


@pytest.fixture(scope="module")
def without_options(modular_model, flux):
    models = {"plain": modular_model, "flux": flux}
    return {kind: bentoml_diffusers.load_model(model) for kind, model in models.items()}


def has_hook(module):
    return any(hasattr(part, "_diffusers_hook") for part in module.modules())


ARRIVALS = [
    ("plain", {"torch_dtype": "bfloat16"}, lambda p: p.unet.dtype == torch.bfloat16),
    (
        "plain",
        {"scheduler_class": "DDIMScheduler"},
        lambda p: type(p.scheduler) is diffusers.DDIMScheduler,
    ),
    ("plain", {"modular_workflow": "text2image"}, lambda p: not hasattr(p, "controlnet")),
    ("plain", {"offload": "group"}, lambda p: has_hook(p.unet) and has_hook(p.text_encoder)),
    (
        "plain",
        {"offload": "group", "offload_arguments": {"exclude_modules": ["vae"]}},
        lambda p: has_hook(p.unet) and not has_hook(p.vae),
    ),
    (
        "plain",
        {"enable_attention_slicing": "max"},
        lambda p: "Sliced" in type(next(iter(p.unet.attn_processors.values()))).__name__,
    ),
    ("plain", {"enable_vae_slicing": True}, lambda p: p.vae.use_slicing),
    ("plain", {"enable_vae_tiling": True}, lambda p: p.vae.use_tiling),
    (
        "plain",
        {"channels_last": True},
        lambda p: p.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last),
    ),
    (
        "plain",
        {"enable_torch_compile": True},
        lambda p: p.unet._compiled_call_impl is not None,
    ),
    (
        "plain",
        {"layerwise_casting": "float8_e4m3fn"},
        lambda p: torch.float8_e4m3fn in {one.dtype for one in p.unet.parameters()},
    ),
    (
        "flux",
        {"attention_backend": "_native_math"},
        lambda p: all(
            one._attention_backend == "_native_math"
            for one in p.transformer.attn_processors.values()
        ),
    ),
    ("flux", {"step_cache": "first_block_cache"}, lambda p: p.transformer.is_cache_enabled),
    (
        "flux",
        {"pipeline_class": "FluxKontextModularPipeline"},
        lambda p: type(p) is diffusers.FluxKontextModularPipeline,
    ),
]


@pytest.mark.parametrize(
    ("kind", "options", "arrived"), ARRIVALS, ids=["-".join(map(str, o)) for _, o, _ in ARRIVALS]
)
def test_each_option_arrives(kind, options, arrived, modular_model, flux, without_options):
    assert not arrived(without_options[kind])
    model = {"plain": modular_model, "flux": flux}[kind]
    assert arrived(bentoml_diffusers.load_model(model, **options))


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        ("plain", {"modular_workflow": "txt2img"}, errors.InvalidOption, "text2image"),
        (
            "plain",
            {"modular_workflow": "controlnet_text2image"},
            errors.InvalidModel,
            "controlnet.*'controlnet_text2image'",
        ),
        ("plain", {"device_map": "balanced"}, errors.UnsupportedByPipeline, "device_map"),
        ("plain", {"offload": "sequential"}, errors.UnsupportedByPipeline, "sequential"),
        pytest.param(
            "plain",
            {"offload": "model"},
            errors.InvalidOption,
            "offload",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("plain", {"variant": "fp16"}, errors.InvalidOption, "variant"),
        (
            "plain",
            {"load_pretrained_extra_kwargs": {"vae": None}},
            errors.UnsupportedByPipeline,
            "load_pretrained_extra_kwargs",
        ),
        ("plain", {"pipeline_class": "FluxPipeline"}, errors.InvalidOption, "modular"),
        ("plain", {"custom_pipeline": "score_sde_vp"}, errors.InvalidOption, "custom_pipeline"),
        ("plain", {"attention_backend": "_native_math"}, errors.UnsupportedByPipeline, "backend"),
        ("flux", {"step_cache": "faster_cache"}, errors.UnsupportedByPipeline, "faster_cache"),
    ],
)
def test_what_cannot_be_is_one_clear_error(modular_model, flux, kind, options, error, words):
    with pytest.raises(error, match=words):
        bentoml_diffusers.load_model({"plain": modular_model, "flux": flux}[kind], **options)


def test_a_classic_pipeline_has_no_modular_workflow(model):
    with pytest.raises(errors.UnsupportedByPipeline, match="modular_workflow"):
        bentoml_diffusers.load_model(model, modular_workflow="text2image")


def test_arguments_reach_components_with_weights_only(modular_model, monkeypatch):
    seen = {}

    def spy(self, **arguments):
        seen[self.name] = arguments
        raise ValueError("enough")

    specs = diffusers.modular_pipelines.ComponentSpec
    monkeypatch.setattr(specs, "load", spy)
    eight_bit = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantized = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": eight_bit})
    order = {"text_encoder": True, "tokenizer": False}
    folder = Path(modular_model.path_of("diffusion_model"))
    for name in order:
        spec = specs(name=name, type_hint=None if order[name] else diffusers.DDIMScheduler)
        with pytest.raises(errors.InvalidModel, match="enough"):
            loading.modular._load(
                modular_model,
                folder,
                spec,
                bentoml_diffusers.ModelOptions(
                    quantization_config=quantized, low_cpu_mem_usage=False, torch_dtype="float16"
                ),
            )
    assert seen["text_encoder"]["quantization_config"].load_in_8bit
    assert seen["text_encoder"]["dtype"] is torch.float16
    assert seen["text_encoder"]["low_cpu_mem_usage"] is False
    assert seen["text_encoder"]["use_safetensors"] is True
    assert all(arguments["local_files_only"] for arguments in seen.values())
    assert not {"dtype", "quantization_config"} & set(seen["tokenizer"])


def test_offload_is_left_to_diffusers_manager(modular_model, monkeypatch):
    plain = bentoml_diffusers.load_model(modular_model, "cpu")
    assert exclusive_reason(plain) is None
    # diffusers asks the device for its free memory, which a CPU does not tell as a GPU does.
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda *_: (2**30, 2**30), raising=False)
    pipeline = bentoml_diffusers.load_model(modular_model, "cpu", offload="model")
    assert hasattr(pipeline.unet, "_hf_hook")
    assert not exclusive_reason(pipeline).calls_can_be_collected


# Adapters


@pytest.fixture(scope="module")
def lora_xl(tmp_path_factory):
    """File of a LoRA for the tiny SDXL."""
    folder = tmp_path_factory.mktemp("lora-xl")
    pipeline = testing.tiny_stable_diffusion_xl()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for key, value in pipeline.unet.named_parameters():
            if "lora_" in key:
                value.fill_(0.3)
    layers = get_peft_model_state_dict(pipeline.unet)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, weight_name="style.safetensors"
    )
    return folder / "style.safetensors"


def test_static_loras_and_textual_inversions_work(modular_model, lora_xl, tmp_path):
    loaded = bentoml_diffusers.load_model(
        modular_model, lora_dir=str(lora_xl.parent), lora_weights=lora_xl.name
    )
    reference = testing.tiny_modular_stable_diffusion_xl()
    without = generate(reference)
    reference.load_lora_weights(str(lora_xl.parent), weight_name=lora_xl.name)
    assert (generate(loaded) == generate(reference)).all()
    assert (generate(loaded) != without).any()
    vectors = {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)}
    save_file(vectors, tmp_path / "word.safetensors")
    word = {"name": "word.safetensors", "token": "<word>"}
    worded = bentoml_diffusers.load_model(
        modular_model, lora_dir=str(tmp_path), textual_inversions=word
    )
    for tokenizer in (worded.tokenizer, worded.tokenizer_2):
        assert "<word>" in tokenizer.get_vocab()


def test_a_lora_of_a_request_works(modular_model, lora_xl):
    reference = testing.tiny_modular_stable_diffusion_xl()
    without = generate(reference)
    reference.load_lora_weights(str(lora_xl.parent), weight_name=lora_xl.name)
    with_it = generate(reference)
    with Engine.from_model(modular_model, lora_dir=str(lora_xl.parent)) as engine:
        for lora, pixels in ((lora_xl.name, with_it), (None, without), (lora_xl.name, with_it)):
            result = engine.run("text2image", **CALL, seed=0, lora_weights=lora)
            assert abs(np.asarray(result.images[0]).astype(int) - pixels).max() <= 1


# Shared components


def bytes_of(manager):
    """Memory of all modules of a manager, each once."""
    modules = {
        id(part): part for part in manager.components.values() if isinstance(part, torch.nn.Module)
    }
    return sum(part.get_memory_footprint() for part in modules.values())


def test_what_two_pipelines_share_is_loaded_once(modular_model, sdxl_folder, tmp_path, name):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "other"))
    other_unet = testing.tiny_stable_diffusion_xl(seed=5).unet
    other_unet.save_pretrained(folder / "unet")
    other = bentoml_diffusers.import_model(name, folder, pipeline_class="ModularPipeline")
    manager = ComponentsManager()
    one = bentoml_diffusers.load_model(modular_model, components_manager=manager)
    before = bytes_of(manager)
    two = bentoml_diffusers.load_model(other, components_manager=manager)
    assert two.vae is one.vae
    assert two.text_encoder_2 is one.text_encoder_2
    assert two.tokenizer is one.tokenizer
    assert two.tokenizer_2 is one.tokenizer_2  # not the first, which has the same files
    assert two.unet.conv_in.weight.data_ptr() != one.unet.conv_in.weight.data_ptr()
    assert two.vae.decoder.conv_in.weight.data_ptr() == one.vae.decoder.conv_in.weight.data_ptr()
    assert two.scheduler is not one.scheduler  # it counts the steps of a call
    assert bytes_of(manager) - before == other_unet.get_memory_footprint()
    table = repr(manager)
    assert table.count("AutoencoderKL") == 1
    assert table.count("UNet2DConditionModel") == 2
    alone = generate(bentoml_diffusers.load_model(other))
    assert (generate(two) == alone).all()
    assert (generate(one) != alone).any()


def test_the_same_again_costs_nothing_and_another_dtype_does(modular_model):
    manager = ComponentsManager()
    one = bentoml_diffusers.load_model(modular_model, components_manager=manager)
    before = bytes_of(manager)
    two = bentoml_diffusers.load_model(modular_model, components_manager=manager)
    assert two.unet is one.unet
    assert bytes_of(manager) == before
    half = bentoml_diffusers.load_model(
        modular_model,
        components_manager=manager,
        torch_dtype="bfloat16",
        modular_workflow="text2image",
    )
    assert half.unet is not one.unet
    assert one.unet.dtype is torch.float32


def test_a_classic_pipeline_shares_with_a_modular_one(
    modular_model, sdxl_folder, name, sdxl_pixels
):
    manager = ComponentsManager()
    model = bentoml_diffusers.import_model(name, sdxl_folder)
    one = bentoml_diffusers.load_model(model, components_manager=manager)
    two = bentoml_diffusers.load_model(modular_model, components_manager=manager)
    three = bentoml_diffusers.load_model(model, components_manager=manager)
    assert one.unet is two.unet is three.unet
    assert (generate(two) == sdxl_pixels).all()
    assert (generate(three, guidance_scale=7.5) == sdxl_pixels).all()


def test_a_unet_with_an_ip_adapter_is_another_one(adapted):
    model, with_it, without = adapted
    manager = ComponentsManager()
    one = bentoml_diffusers.load_model(model, components_manager=manager)
    two = bentoml_diffusers.load_model(
        model, components_manager=manager, modular_workflow="text2image"
    )
    three = bentoml_diffusers.load_model(model, components_manager=manager)
    assert two.unet is not one.unet
    assert three.unet is one.unet
    assert two.vae is one.vae
    assert (generate(two) == without).all()
    assert (generate(three, ip_adapter_image=IMAGE) == with_it).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components_manager": {}}, "ComponentsManager"),
        ({"lora_weights": "x"}, "lora_weights"),
        ({"channels_last": True}, "channels_last"),
        ({"offload": "group"}, "offload"),
    ],
)
def test_sharing_with_what_changes_modules_is_refused(modular_model, options, words):
    with pytest.raises(errors.InvalidOption, match=words):
        bentoml_diffusers.load_model(
            modular_model, **{"components_manager": ComponentsManager(), **options}
        )


# Mellon


@pytest.fixture
def mellon():
    def call(*arguments):
        return CliRunner().invoke(cli, ["diffusers", "mellon", *map(str, arguments)])

    return call


def test_mellon_nodes_of_blocks_of_diffusers(mellon, modular_model, tmp_path):
    done = mellon(modular_model.tag, "-o", tmp_path / "mellon.json")
    assert done.exit_code == 0, done.output
    config = MellonPipelineConfig.load(tmp_path / "mellon.json").to_dict()
    wanted = MellonPipelineConfig.from_blocks(StableDiffusionXLAutoBlocks()).to_dict()
    assert config["node_params"] == json.loads(json.dumps(wanted["node_params"]))
    assert config["node_params"]["denoise"]["params"]["num_inference_steps"]
    assert config["label"] == modular_model.tag.name
    part = json.loads(mellon(modular_model.tag, "--modular-workflow", "text2image").output)
    assert "mask_image" not in part["node_params"]["custom"]["params"]
    assert "num_inference_steps" in part["node_params"]["custom"]["params"]


def test_mellon_of_own_blocks_needs_trust(mellon, sdxl_folder, tmp_path, name):
    write_blocks(tmp_path, f"mellon {name}")
    model = bentoml_diffusers.import_model(name, sdxl_folder, custom_pipeline=str(tmp_path))
    refused = mellon(model.tag)
    assert refused.exit_code == 1
    assert "sha256" in refused.output
    config = json.loads(mellon(model.tag, "--trust-remote-code").stdout)
    wanted = MellonPipelineConfig.from_custom_block(StableDiffusionXLAutoBlocks())
    assert set(config["node_params"]) == {"custom"}
    assert config["node_params"]["custom"] == json.loads(
        json.dumps(wanted.to_dict()["node_params"]["custom"])
    )


def test_mellon_of_a_classic_pipeline_is_one_line(mellon, model):
    done = mellon(model.tag)
    assert done.exit_code == 1
    assert "is not a modular pipeline" in done.output
