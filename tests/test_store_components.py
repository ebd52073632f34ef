"""Whatever diffusers reads or holds comes along: into the store, and back out of it."""

import ast
import importlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    MultiAdapter,
    StableCascadeDecoderPipeline,
    StableCascadeUNet,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

import bentoml_diffusers
from bentoml_diffusers import errors, testing
from bentoml_diffusers.store.sources import select_files
from bentoml_diffusers.testing.text import tiny_clip_with_projection, tiny_tokenizer


def two_controlnets():
    base = testing.tiny_controlnet()
    other = ControlNetModel.from_config(base.controlnet.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.01)
    return StableDiffusionControlNetPipeline(
        **{**base.components, "controlnet": [base.controlnet, other]},
        requires_safety_checker=False,
    )


def three_adapters():
    base = testing.tiny_stable_diffusion()
    adapters = [T2IAdapter(channels=[8, 16], num_res_blocks=1) for _ in range(3)]
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    return StableDiffusionAdapterPipeline(
        **parts, adapter=MultiAdapter(adapters), requires_safety_checker=False
    )


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("store", ["import", "save"])
def test_several_controlnets_come_along(store, tmp_path, name):
    pipeline = two_controlnets()
    if store == "import":
        pipeline.save_pretrained(tmp_path)
        model = bentoml_diffusers.import_model(name, tmp_path)
        assert bentoml_diffusers.import_model(name, tmp_path).tag == model.tag
    else:
        model = bentoml_diffusers.save_model(name, pipeline)
    loaded = bentoml_diffusers.load_model(model)
    assert_same_weights(loaded.controlnet, pipeline.controlnet)


def test_a_third_t2i_adapter_is_kept_or_refused(tmp_path, name):
    pipeline = three_adapters()
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert_same_weights(loaded.adapter, pipeline.adapter)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(errors.InvalidModel, match="rename it to adapter_2"):
        bentoml_diffusers.import_model(name, tmp_path)
    (tmp_path / "adapter_1_2").rename(tmp_path / "adapter_2")
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.import_model(name, tmp_path))
    assert_same_weights(loaded.adapter, pipeline.adapter)


def test_every_class_of_diffusers_that_reads_numbered_folders_is_known():
    root = inspect.getfile(diffusers).rpartition("/")[0]
    found = set()
    for path in Path(root, "models").rglob("*.py"):
        text = path.read_text()
        if 'f"_{idx}"' not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and 'f"_{idx}"' in ast.get_source_segment(text, node):
                found.add(node.name)
    assert found == {"MultiControlNetModel", "MultiControlNetUnionModel", "MultiAdapter"}


def test_a_component_at_the_root_is_taken(tmp_path, name):
    pipeline = testing.tiny_ddpm()
    pipeline.save_pretrained(tmp_path)
    for file in (*(tmp_path / "unet").iterdir(), *(tmp_path / "scheduler").iterdir()):
        file.rename(tmp_path / file.name)
    (tmp_path / "unet").rmdir()
    (tmp_path / "scheduler").rmdir()
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.import_model(name, tmp_path))
    assert_same_weights(loaded.unet, pipeline.unet)


def test_the_root_is_not_taken_for_a_component_without_its_config(tmp_path, name):
    testing.tiny_ddpm().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(errors.InvalidModel, match="lacks the folder of 'unet'"):
        bentoml_diffusers.import_model(name, tmp_path)


@pytest.mark.parametrize("named", [["diffusers", "FlowMatchEulerDiscreteScheduler"], [None, None]])
def test_a_component_that_diffusers_never_loads_may_be_missing(named):
    index = {
        "_class_name": "LongCatAudioDiTPipeline",
        "scheduler": named,
        "transformer": ["diffusers", "LongCatAudioDiTTransformer"],
    }
    weights = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    assert set(select_files(index, weights, source="x").files) == {"model_index.json", *weights}
    with pytest.raises(errors.InvalidModel, match="lacks the folder of 'transformer'"):
        select_files(index, [], source="x")


def adapted_sdxl(tmp_path):
    pipeline = testing.tiny_stable_diffusion_xl()
    parts = testing.tiny_modular_stable_diffusion_xl(image_encoder=True).components
    pipeline.register_modules(
        image_encoder=parts["image_encoder"], feature_extractor=parts["feature_extractor"]
    )
    file = testing.save_tiny_ip_adapter(tmp_path / "adapter")
    pipeline.load_ip_adapter(file.parent, subfolder="", weight_name=file.name)
    pipeline.set_ip_adapter_scale(0.6)
    return pipeline


def run_adapted(pipeline, **more):
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red circle",
        num_inference_steps=2,
        generator=generator,
        ip_adapter_image=image,
        output_type="np",
        **more,
    ).images


def test_an_ip_adapter_of_a_classic_pipeline_comes_back(tmp_path, name):
    pipeline = adapted_sdxl(tmp_path)
    expected = run_adapted(pipeline)
    model = bentoml_diffusers.save_model(name, pipeline)
    assert np.array_equal(run_adapted(pipeline), expected)  # and stays where it was
    assert np.array_equal(run_adapted(bentoml_diffusers.load_model(model)), expected)
    pipeline.set_ip_adapter_scale(0.0)
    assert not np.array_equal(run_adapted(pipeline), expected)
    folder = Path(model.path, "diffusion_model")
    again = bentoml_diffusers.import_model(f"{name}-again", folder)
    assert np.array_equal(run_adapted(bentoml_diffusers.load_model(again)), expected)


def test_an_ip_adapter_outside_of_a_unet_is_refused(name):
    pipeline = testing.tiny_flux()
    processors = pipeline.transformer.attn_processors
    adapted = diffusers.models.attention_processor.FluxIPAdapterJointAttnProcessor2_0(8, 8)
    pipeline.transformer.set_attn_processor(dict.fromkeys(processors, adapted))
    with pytest.raises(errors.InvalidModel, match="IP-Adapter in its transformer"):
        bentoml_diffusers.save_model(name, pipeline)


def test_shared_components_differ_by_all_of_their_files(name):
    pipeline = two_controlnets()
    first = bentoml_diffusers.save_model(f"{name}-first", pipeline)
    with torch.no_grad():
        for parameter in pipeline.controlnet.nets[1].parameters():
            parameter.fill_(0.02)
    second = bentoml_diffusers.save_model(f"{name}-second", pipeline)
    manager = diffusers.ComponentsManager()
    one, other = (
        bentoml_diffusers.load_model(model, components_manager=manager) for model in (first, second)
    )
    assert one.unet is other.unet
    assert_same_weights(other.controlnet, pipeline.controlnet)


def cascade():
    tokenizer = tiny_tokenizer()
    return StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            patch_size=1,
            conditioning_dim=16,
            block_out_channels=[16, 32],
            num_attention_heads=[-1, 2],
            down_num_layers_per_block=[1, 1],
            up_num_layers_per_block=[1, 1],
            down_blocks_repeat_mappers=[1, 1],
            up_blocks_repeat_mappers=[1, 1],
            block_types_per_layer=[
                ["SDCascadeResBlock", "SDCascadeTimestepBlock"],
                ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"],
            ],
            clip_text_pooled_in_channels=16,
            self_attn=[False, False],
            dropout=[0.1, 0.1],
        ),
        tokenizer=tokenizer,
        text_encoder=tiny_clip_with_projection(tokenizer),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8),
    )


@pytest.mark.parametrize("library", ["wuerstchen", "diffusers"])
def test_a_class_that_diffusers_moved_is_found_again(library, tmp_path, name):
    pipeline = cascade()
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert_same_weights(loaded.vqgan, pipeline.vqgan)
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "vqgan": [library, "PaellaVQModel"]}))
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.import_model(name, tmp_path))
    assert_same_weights(loaded.vqgan, pipeline.vqgan)


def longcat(**parts):
    tokenizer = tiny_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return LongCatAudioDiTPipeline(
        vae=LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=2,
        ),
        text_encoder=UMT5EncoderModel(config),
        tokenizer=tokenizer,
        transformer=LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=16, latent_dim=4
        ),
        **parts,
    )


@pytest.mark.parametrize("named", [None, [None, None]])
def test_a_folder_without_the_scheduler_that_the_class_makes_is_taken(named, tmp_path, name):
    longcat().save_pretrained(tmp_path)
    assert not (tmp_path / "scheduler").exists()
    index = tmp_path / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "scheduler": named or values["scheduler"]}))
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.import_model(name, tmp_path))
    assert loaded.scheduler.config.invert_sigmas


def test_a_component_that_diffusers_does_not_save_comes_back(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = bentoml_diffusers.save_model(name, longcat(scheduler=scheduler))
    assert bentoml_diffusers.load_model(model).scheduler.config.shift == 3.0


def write_package(folder, imports):
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "strength.py").write_text("STRENGTH = 7\n")
    (folder / "mine.py").write_text(
        f"from diffusers import DDPMPipeline\n{imports}\n\n\n"
        "class Mine(DDPMPipeline):\n    strength = STRENGTH\n"
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package with a pipeline of its own; it is gone, and forgotten, after the test."""

    def make(imports):
        write_package(tmp_path / "own_package", imports)
        return importlib.import_module("own_package.mine").Mine(**testing.tiny_ddpm().components)

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for name in [key for key in sys.modules if key.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def test_code_with_relative_imports_comes_along(package, tmp_path, name):
    model = bentoml_diffusers.save_model(name, package("from .strength import STRENGTH"))
    shutil.rmtree(tmp_path / "own_package")
    assert bentoml_diffusers.load_model(model, trust_remote_code=True).strength == 7


def test_code_that_works_only_where_it_lies_is_refused(package, name):
    pipeline = package("STRENGTH = 1\ntry:\n    from ..x import y\nexcept ImportError:\n    pass")
    with pytest.raises(errors.InvalidModel, match=r"imports \.\.x, which is not in its folder"):
        bentoml_diffusers.save_model(name, pipeline)


def test_a_service_names_the_adapters_that_it_is_loaded_with(model, lora_dir, name):
    lora = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")
    svc = bentoml_diffusers.service(str(model.tag), lora_weights={"name": name, "scale": 0.5})
    assert [str(needed.tag) for needed in svc.models] == [str(lora.tag), str(model.tag)]
    assert len(bentoml_diffusers.service(str(model.tag)).models) == 1
