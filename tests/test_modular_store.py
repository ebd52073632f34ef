"""Modular pipelines in the store and at load: nothing lost, nothing elsewhere, nothing unsaid."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bentoml
import diffusers
import numpy as np
import pytest
import torch
import transformers
from bentoml_cli.cli import cli
from click.testing import CliRunner
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import ComponentsManager, SequentialPipelineBlocks
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, errors, loading, store, testing

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32}
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
BLOCK = """
from diffusers import StableDiffusionXLAutoBlocks

from .helper import WORD


class Ours(StableDiffusionXLAutoBlocks):
    word = WORD
"""

INVERT = """
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
from PIL import ImageOps


class Invert(ModularPipelineBlocks):
    model_name = "stable-diffusion-xl"

    def __init__(self, by=255):
        super().__init__()
        self.by = by

    @property
    def inputs(self):
        return [InputParam("images")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.images = [ImageOps.invert(picture) for picture in block_state.images]
        self.set_block_state(state, block_state)
        return components, state
"""


def paint(pipeline, seed=0, **more):
    """Pixels of one picture; diffusers' own call."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipeline, diffusers.ModularPipeline):
        pictures = pipeline(**CALL, **more, generator=generator, output="images")
    else:
        pictures = pipeline(**CALL, **more, generator=generator).images
    return np.asarray(pictures[0]).astype(int)


def index_of(model):
    return json.loads(
        Path(model.path_of("diffusion_model"), "modular_model_index.json").read_text()
    )


def record_of(model):
    return store.read_record(Path(model.path))


def rewrite(path, **entries):
    """Changes entries of a JSON file; ``None`` takes one out."""
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def entry(library, name, repository=None, subfolder="", **more):
    details = {"type_hint": [library, name], "pretrained_model_name_or_path": repository}
    return [library, name, {**details, "subfolder": subfolder, **more}]


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    """A tiny SDXL, saved by diffusers as a classic pipeline. Not to be written to."""
    folder = tmp_path_factory.mktemp("classic")
    testing.tiny_stable_diffusion_xl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(classic):
    """The classic folder in the store, as a modular pipeline."""
    return bentoml_diffusers.import_model(
        "modular-plain", classic, pipeline_class="ModularPipeline"
    )


@pytest.fixture(scope="module")
def expected():
    """What the tiny SDXL paints at the guider's default."""
    return paint(testing.tiny_stable_diffusion_xl(), guidance_scale=7.5)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A tiny modular SDXL, saved by diffusers. Not to be written to."""
    folder = tmp_path_factory.mktemp("modular") / "repository"
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture
def copied(repository, tmp_path):
    """A copy of it that may be written to; its index still names the old place."""
    return Path(shutil.copytree(repository, tmp_path / "copied"))


@pytest.fixture
def with_code(copied):
    """Puts the code of blocks into the copy."""

    def run(word="ours", block=BLOCK):
        (copied / "block.py").write_text(block)
        (copied / "helper.py").write_text(f"WORD = {word!r}\n")
        auto_map = {"ModularPipelineBlocks": "block.Ours"}
        (copied / "modular_config.json").write_text(json.dumps({"auto_map": auto_map}))
        rewrite(copied / "modular_model_index.json", _blocks_class_name="Ours")
        return copied

    return run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Imports Python code as a module of its own file."""

    def run(code, name="blocks_of_a_test", **helpers):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in {"__init__": "", "block": code, **helpers}.items():
            (folder / f"{file}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        for known in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
        return importlib.import_module(f"{name}.block")

    return run


# From a classic folder


def test_a_classic_folder_paints_the_same_as_a_modular_pipeline(plain, expected):
    pipeline = bentoml_diffusers.load_model(plain)
    assert type(pipeline) is diffusers.StableDiffusionXLModularPipeline
    assert (paint(pipeline) == expected).all()
    record = record_of(plain)
    assert record.kind == "pipeline"
    assert record.class_name == "StableDiffusionXLModularPipeline"
    assert record.details["blocks"] == "StableDiffusionXLAutoBlocks"
    assert record.details["modular_workflows"] == ["text2image", "image2image", "inpainting"]
    assert record.components["unet"] == "diffusers.UNet2DConditionModel"
    assert store.verify(plain).is_whole


def test_the_stored_index_names_nothing_outside(plain, classic):
    text = json.dumps(index_of(plain))
    assert str(classic.parent) not in text
    for value in index_of(plain).values():
        if isinstance(value, list):
            assert value[2]["pretrained_model_name_or_path"] is None
            assert value[2]["revision"] is None
    assert not Path(plain.path_of("diffusion_model"), "model_index.json").exists()


def test_the_same_import_again_is_the_same_model(plain, classic):
    again = bentoml_diffusers.import_model(
        "modular-plain", classic, pipeline_class="ModularPipeline"
    )
    assert again.tag == plain.tag
    other = bentoml_diffusers.import_model("modular-plain", classic)
    assert other.tag != plain.tag
    assert type(bentoml_diffusers.load_model(other)) is diffusers.StableDiffusionXLPipeline


def test_a_classic_model_of_the_store_loads_as_a_modular_one(classic, expected, name):
    model = bentoml_diffusers.import_model(name, classic)
    pipeline = bentoml_diffusers.load_model(model, pipeline_class="ModularPipeline")
    assert (paint(pipeline) == expected).all()


def test_a_class_without_blocks_is_refused(pipeline_folder, name):
    with pytest.raises(errors.InvalidModel, match="no modular pipeline"):
        bentoml_diffusers.import_model(name, pipeline_folder, pipeline_class="ModularPipeline")


def test_null_entries_of_a_classic_index_do_not_hide_what_is_made_from_a_config(
    classic, tmp_path, name
):
    folder = Path(shutil.copytree(classic, tmp_path / "null"))
    rewrite(folder / "model_index.json", feature_extractor=[None, None], image_encoder=[None, None])
    model = bentoml_diffusers.import_model(name, folder, pipeline_class="ModularPipeline")
    pipeline = bentoml_diffusers.load_model(model)
    assert callable(pipeline.feature_extractor)


# From a modular folder


def test_a_moved_folder_is_imported_whole(copied, expected, name):
    index = json.loads((copied / "modular_model_index.json").read_text())
    assert index["unet"][2]["pretrained_model_name_or_path"] != str(copied)  # the old place
    model = bentoml_diffusers.import_model(name, copied)
    assert (paint(bentoml_diffusers.load_model(model)) == expected).all()
    assert str(copied.parent) not in json.dumps(index_of(model))
    assert bentoml_diffusers.import_model(name, copied).tag == model.tag
    shutil.rmtree(copied)
    assert (paint(bentoml_diffusers.load_model(model)) == expected).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "no files for 'vae'"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "weights.*'vae'"),
        (
            lambda f: rewrite(
                f / "modular_model_index.json",
                controlnet=entry("diffusers", "ControlNetModel", "owner/hub-id", "controlnet"),
            ),
            "'controlnet'.*'owner/hub-id'",
        ),
        (
            lambda f: (
                rewrite(
                    f / "modular_model_index.json", unet=entry("diffusers", "UNet2DConditionModel")
                )
                or shutil.rmtree(f / "unet")
            ),
            "lacks unet",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", vae=entry("os", "system", "x", "vae")
            ),
            r"os\.system",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json",
                controlnet=entry("diffusers", "AutoencoderKL", "a/b", "../vae"),
            ),
            "outside",
        ),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", vae=["diffusers", "AutoencoderKL", 3]
            ),
            "'vae'",
        ),
        (
            lambda f: rewrite(f / "modular_model_index.json", _class_name="DiffusionPipeline"),
            "no modular pipeline",
        ),
        (lambda f: (f / "modular_model_index.json").write_text("{"), "modular_model_index.json"),
        (lambda f: (f / "vae" / "modeling.py").write_text("raise SystemExit"), "vae/modeling.py"),
        (
            lambda f: rewrite(
                f / "modular_model_index.json", _blocks_class_name="SequentialPipelineBlocks"
            ),
            "from_blocks_dict",
        ),
    ],
)
def test_a_folder_that_would_not_be_whole_is_refused_now(copied, name, change, words):
    change(copied)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, copied)
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.get(name)


def test_what_fails_to_load_is_an_error_and_not_none(copied, name):
    model = bentoml_diffusers.import_model(name, copied)
    path = Path(model.path_of("diffusion_model"), "vae", "config.json")
    rewrite(path, latent_channels=5)
    with pytest.raises(errors.InvalidModel, match="vae"):
        bentoml_diffusers.load_model(model)
    shutil.rmtree(path.parent)
    with pytest.raises(errors.InvalidModel, match="vae"):
        bentoml_diffusers.load_model(model)


def test_variants_are_taken_and_loaded(copied, name):
    unet = testing.tiny_stable_diffusion_xl(seed=3).unet
    unet.save_pretrained(copied / "unet", variant="fp16")
    model = bentoml_diffusers.import_model(name, copied, variant="fp16")
    assert index_of(model)["unet"][2]["variant"] == "fp16"
    assert index_of(model)["vae"][2]["variant"] is None
    loaded = bentoml_diffusers.load_model(model).unet
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)
    with pytest.raises(errors.InvalidModel, match="int4"):
        bentoml_diffusers.import_model(f"{name}-int4", copied, variant="int4")


# Code of blocks


def test_code_is_stored_and_runs_only_when_trusted(with_code, name):
    model = bentoml_diffusers.import_model(name, with_code(f"only {name}"))
    code = record_of(model).code
    assert (code.entry, code.class_name) == ("block.py", "Ours")
    assert sorted(os.listdir(Path(model.path, "code"))) == ["block.py", "helper.py"]
    with pytest.raises(errors.UntrustedSource, match=code.sha256):
        bentoml_diffusers.load_model(model)
    trusted = bentoml_diffusers.load_model(model, trust_remote_code=True)
    assert trusted.blocks.word == f"only {name}"
    assert type(trusted.blocks).__module__.startswith("_bentoml_diffusers_code_")
    rewritten = Path(model.path, "code", "helper.py")
    rewritten.write_text("WORD = 'evil'")
    with pytest.raises(errors.InvalidModel, match="other code"):
        bentoml_diffusers.load_model(model, trust_remote_code=True)


def test_two_models_with_a_block_py_each_never_mix(with_code, name, expected):
    loaded = []
    for word in ("one", "two"):
        model = bentoml_diffusers.import_model(
            f"{name}-{word}", with_code(f"{name} {word}"), trust_remote_code=True
        )
        loaded.append(bentoml_diffusers.load_model(model))
    assert [pipeline.blocks.word for pipeline in loaded] == [f"{name} one", f"{name} two"]
    assert (paint(loaded[0]) == expected).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "block.py").unlink(), "not there: block.py"),
        (lambda f: (f / "helper.py").unlink(), "helper, which is not beside it"),
        (lambda f: (f / "block.py").write_text("import helper"), "from .helper import"),
        (lambda f: (f / "block.py").write_text("from ..up import x"), "one folder"),
        (lambda f: (f / "block.py").write_text("class ("), "no Python file"),
        (
            lambda f: rewrite(
                f / "modular_config.json", auto_map={"ModularPipelineBlocks": "__main__.Ours"}
            ),
            "__main__.Ours",
        ),
    ],
)
def test_code_that_could_not_run_is_refused_now(with_code, name, change, words):
    folder = with_code()
    change(folder)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, folder)


def test_blocks_alone_need_a_pipeline(with_code, classic, tmp_path, name, expected):
    folder = with_code(f"alone {name}")
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    for file in ("block.py", "helper.py", "modular_config.json"):
        shutil.copy(folder / file, blocks)
    with pytest.raises(errors.InvalidModel, match="custom_pipeline"):
        bentoml_diffusers.import_model(name, blocks)
    model = bentoml_diffusers.import_model(
        name, classic, custom_pipeline=str(blocks), trust_remote_code=True
    )
    pipeline = bentoml_diffusers.load_model(model)
    assert pipeline.blocks.word == f"alone {name}"
    assert (paint(pipeline) == expected).all()


# From memory


def test_everything_of_a_pipeline_travels_to_another_store(module, tmp_path, name):
    """Own blocks, guider, ControlNet, IP-Adapter and scale: in a new process, elsewhere."""
    blocks = module(BLOCK, helper="WORD = 'travelled'").Ours()
    pipeline = testing.tiny_modular_stable_diffusion_xl(
        blocks=blocks, controlnet=True, image_encoder=True
    )
    pipeline.update_components(guider=pipeline.guider.new(guidance_scale=4.0))
    adapter = testing.save_tiny_ip_adapter(tmp_path / "ip")
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    pipeline.set_ip_adapter_scale(0.6)
    before = paint(pipeline, ip_adapter_image=PICTURE, control_image=PICTURE)
    spec = dict(pipeline.config["unet"][2])
    model = bentoml_diffusers.save_model(name, pipeline)
    assert pipeline.config["unet"][2] == spec  # diffusers would write the place it saves to
    assert (paint(pipeline, ip_adapter_image=PICTURE, control_image=PICTURE) == before).all()
    archive = bentoml.models.export_model(str(model.tag), str(tmp_path / "x.bentomodel"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import bentoml, bentoml_diffusers, json
from test_modular_store import PICTURE, paint
bentoml.models.import_model({archive!r})
try:
    bentoml_diffusers.load_model({str(model.tag)!r})
except bentoml_diffusers.errors.UntrustedSource:
    pass
pipeline = bentoml_diffusers.load_model({str(model.tag)!r}, trust_remote_code=True)
picture = paint(pipeline, ip_adapter_image=PICTURE, control_image=PICTURE)
found = [pipeline.blocks.word, pipeline.guider.guidance_scale, pipeline.null_component_names]
print(json.dumps([found, picture.tolist()]))
"""
    other = {"BENTOML_HOME": str(tmp_path / "other"), "HF_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **other},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, picture = json.loads(done.stdout.splitlines()[-1])
    assert found == ["travelled", 4.0, []]
    assert (np.asarray(picture) == before).all()
    assert not (tmp_path / "none" / "modules").exists()


def test_blocks_put_together_from_parts_come_back_as_they_are(module, name, expected):
    parts = StableDiffusionXLAutoBlocks().get_workflow("text2image").sub_blocks
    own = module(INVERT).Invert
    blocks = SequentialPipelineBlocks.from_blocks_dict({**parts, "invert": own})
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    assert (paint(pipeline) == 255 - expected).all()
    model = bentoml_diffusers.save_model(name, pipeline)
    assert os.listdir(Path(model.path, "code")) == ["block.py"]
    loaded = bentoml_diffusers.load_model(model)
    assert list(loaded.blocks.sub_blocks) == [*parts, "invert"]
    assert (paint(loaded) == 255 - expected).all()


def test_parts_of_a_larger_pipeline_come_back_as_they_are(name, expected):
    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image")
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.blocks) is SequentialPipelineBlocks
    assert list(loaded.blocks.sub_blocks) == list(blocks.sub_blocks)
    assert (paint(loaded) == expected).all()


def test_a_block_inserted_into_blocks_of_diffusers_is_kept(module, name, expected):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.insert("invert", module(INVERT).Invert(), len(blocks.sub_blocks))
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=blocks)
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.blocks) is StableDiffusionXLAutoBlocks
    assert (paint(loaded) == 255 - expected).all()
    part = bentoml_diffusers.load_model(name, modular_workflow="text2image")
    assert (paint(part) == 255 - expected).all()


def with_state(module):
    return SequentialPipelineBlocks.from_blocks_dict({"invert": module(INVERT).Invert(by=3)})


def in_main(module, monkeypatch):
    own = module(INVERT).Invert
    monkeypatch.setattr(own, "__module__", "__main__")
    return SequentialPipelineBlocks.from_blocks_dict({"invert": own})


def loaded_twice(module):
    first = module(INVERT).Invert
    importlib.reload(sys.modules[first.__module__])
    return SequentialPipelineBlocks.from_blocks_dict({"invert": first})


def with_arguments(module):
    block = module(INVERT.replace("by=255", "by")).Invert(255)
    return SequentialPipelineBlocks.from_blocks_dict({"invert": block})


def from_two_folders(module):
    one, two = module(INVERT, "one_folder").Invert, module(INVERT, "two_folder").Invert
    return SequentialPipelineBlocks.from_blocks_dict({"one": one, "two": two})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_state, "state of its own, by"),
        (in_main, "__main__"),
        (loaded_twice, "any more"),
        (with_arguments, "needs arguments"),
        (from_two_folders, "2 folders"),
    ],
)
def test_blocks_that_would_come_back_otherwise_are_refused(
    module, monkeypatch, request, name, make, words
):
    more = {"monkeypatch": monkeypatch} if make is in_main else {}
    pipeline = testing.tiny_modular_stable_diffusion_xl(blocks=make(module, **more))
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.save_model(name, pipeline)


def test_components_that_are_missing_are_named(name):
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(vae=None)
    with pytest.raises(errors.InvalidModel, match="lacks vae"):
        bentoml_diffusers.save_model(name, pipeline)
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(text_encoder=None, tokenizer=None)  # its blocks can do without
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert loaded.text_encoder is None


def test_what_is_made_from_a_config_keeps_it(name):
    pipeline = testing.tiny_modular_stable_diffusion_xl()
    pipeline.update_components(
        guider=diffusers.PerturbedAttentionGuidance(
            guidance_scale=3.0, perturbed_guidance_layers=[0]
        ),
        image_processor=diffusers.image_processor.VaeImageProcessor(do_normalize=False),
    )
    loaded = bentoml_diffusers.load_model(bentoml_diffusers.save_model(name, pipeline))
    assert type(loaded.guider) is diffusers.PerturbedAttentionGuidance
    assert loaded.guider.guidance_scale == 3.0
    ours, theirs = dict(loaded.guider.config), dict(pipeline.guider.config)
    assert {**ours, "_use_default_values": 0} == {**theirs, "_use_default_values": 0}
    assert loaded.image_processor.config.do_normalize is False
    again = bentoml_diffusers.load_model(bentoml_diffusers.save_model(f"{name}-2", loaded))
    assert again.image_processor.config.do_normalize is False


@pytest.mark.parametrize("build", ["tiny_modular_stable_diffusion_xl", "tiny_stable_diffusion_xl"])
def test_loaded_loras_are_refused_by_name(build, name):
    from peft import LoraConfig

    pipeline = getattr(testing, build)()
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="watercolour")
    with pytest.raises(errors.InvalidModel, match=r"unet: watercolour.*unload_lora_weights"):
        bentoml_diffusers.save_model(name, pipeline)


# IP-Adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A stored pipeline with an IP-Adapter at 0.6, and what it paints with and without it."""
    pipeline = testing.tiny_modular_stable_diffusion_xl(image_encoder=True)
    without = paint(pipeline)
    file = testing.save_tiny_ip_adapter(tmp_path_factory.mktemp("ip"))
    pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    pipeline.set_ip_adapter_scale({"down": 0.6, "up": 0.3})
    with_it = paint(pipeline, ip_adapter_image=PICTURE)
    assert (with_it != without).any()
    return bentoml_diffusers.save_model("adapted", pipeline), with_it, without


def test_an_ip_adapter_comes_back_with_its_scales(adapted):
    model, with_it, without = adapted
    pipeline = bentoml_diffusers.load_model(model)
    assert (paint(pipeline, ip_adapter_image=PICTURE) == with_it).all()
    pipeline.unload_ip_adapter()
    assert (paint(pipeline) == without).all()


def test_a_modular_workflow_without_it_does_not_load_it(adapted):
    model, with_it, without = adapted
    pipeline = bentoml_diffusers.load_model(model, modular_workflow="text2image")
    assert (paint(pipeline) == without).all()
    assert not hasattr(pipeline, "image_encoder")
    pipeline = bentoml_diffusers.load_model(model, modular_workflow="ip_adapter_text2image")
    assert (paint(pipeline, ip_adapter_image=PICTURE) == with_it).all()


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
def test_each_option_arrives(kind, options, arrived, plain, flux):
    model = {"plain": plain, "flux": flux}[kind]
    assert not arrived(bentoml_diffusers.load_model(model))
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
def test_what_cannot_be_is_one_clear_error(plain, flux, kind, options, error, words):
    with pytest.raises(error, match=words):
        bentoml_diffusers.load_model({"plain": plain, "flux": flux}[kind], **options)


def test_a_classic_pipeline_has_no_modular_workflow(model):
    with pytest.raises(errors.UnsupportedByPipeline, match="modular_workflow"):
        bentoml_diffusers.load_model(model, modular_workflow="text2image")


def test_arguments_reach_components_with_weights_only(plain, monkeypatch):
    seen = {}

    def spy(self, **arguments):
        seen[self.name] = arguments
        raise ValueError("enough")

    specs = diffusers.modular_pipelines.ComponentSpec
    monkeypatch.setattr(specs, "load", spy)
    eight_bit = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantized = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": eight_bit})
    order = {"text_encoder": True, "tokenizer": False}
    folder = Path(plain.path_of("diffusion_model"))
    for name in order:
        spec = specs(name=name, type_hint=None if order[name] else diffusers.DDIMScheduler)
        with pytest.raises(errors.InvalidModel, match="enough"):
            loading.modular._load(
                plain,
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


def test_offload_is_left_to_diffusers_manager(plain, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        ComponentsManager, "enable_auto_cpu_offload", lambda self, **given: asked.update(given)
    )
    pipeline = bentoml_diffusers.load_model(plain, "meta", offload="model")
    assert asked == {"device": "meta"}
    assert pipeline.unet.device.type == "cpu"


# Adapters


def test_a_lora_of_a_request_works_on_a_modular_pipeline(plain, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    reference = testing.tiny_stable_diffusion_xl()
    reference.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for key, value in reference.unet.named_parameters():
            if "lora_" in key:
                value.fill_(0.3)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(reference.unet),
        weight_name="style.safetensors",
    )
    reference = testing.tiny_modular_stable_diffusion_xl()
    without = paint(reference)
    reference.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    expected = paint(reference)
    assert (expected != without).any()
    with Engine.from_model(plain, lora_dir=str(tmp_path)) as engine:
        for lora, pixels in (
            ("style.safetensors", expected),
            (None, without),
            ("style.safetensors", expected),
        ):
            result = engine.run("text2image", **CALL, seed=0, lora_weights=lora)
            assert abs(np.asarray(result.images[0]).astype(int) - pixels).max() <= 1


# Shared components


def bytes_of(manager):
    """Memory of all modules of a manager, each once."""
    modules = {
        id(part): part for part in manager.components.values() if isinstance(part, torch.nn.Module)
    }
    return sum(part.get_memory_footprint() for part in modules.values())


def test_what_two_pipelines_share_is_loaded_once(plain, classic, tmp_path, name):
    folder = Path(shutil.copytree(classic, tmp_path / "other"))
    other_unet = testing.tiny_stable_diffusion_xl(seed=5).unet
    other_unet.save_pretrained(folder / "unet")
    other = bentoml_diffusers.import_model(name, folder, pipeline_class="ModularPipeline")
    manager = ComponentsManager()
    one = bentoml_diffusers.load_model(plain, components_manager=manager)
    before = bytes_of(manager)
    two = bentoml_diffusers.load_model(other, components_manager=manager)
    assert two.vae is one.vae
    assert two.text_encoder_2 is one.text_encoder_2
    assert two.tokenizer is one.tokenizer
    assert two.unet.conv_in.weight.data_ptr() != one.unet.conv_in.weight.data_ptr()
    assert two.vae.decoder.conv_in.weight.data_ptr() == one.vae.decoder.conv_in.weight.data_ptr()
    assert two.scheduler is not one.scheduler  # it counts the steps of a call
    assert bytes_of(manager) - before == other_unet.get_memory_footprint()
    table = repr(manager)
    assert table.count("AutoencoderKL") == 1
    assert table.count("UNet2DConditionModel") == 2
    alone = paint(bentoml_diffusers.load_model(other))
    assert (paint(two) == alone).all()
    assert (paint(one) != alone).any()


def test_the_same_again_costs_nothing_and_another_dtype_does(plain):
    manager = ComponentsManager()
    one = bentoml_diffusers.load_model(plain, components_manager=manager)
    before = bytes_of(manager)
    two = bentoml_diffusers.load_model(plain, components_manager=manager)
    assert two.unet is one.unet
    assert bytes_of(manager) == before
    half = bentoml_diffusers.load_model(
        plain, components_manager=manager, torch_dtype="bfloat16", modular_workflow="text2image"
    )
    assert half.unet is not one.unet
    assert one.unet.dtype is torch.float32


def test_a_classic_pipeline_shares_with_a_modular_one(plain, classic, name, expected):
    manager = ComponentsManager()
    model = bentoml_diffusers.import_model(name, classic)
    one = bentoml_diffusers.load_model(model, components_manager=manager)
    two = bentoml_diffusers.load_model(plain, components_manager=manager)
    three = bentoml_diffusers.load_model(model, components_manager=manager)
    assert one.unet is two.unet is three.unet
    assert (paint(two) == expected).all()
    assert (paint(three, guidance_scale=7.5) == expected).all()


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
    assert (paint(two) == without).all()
    assert (paint(three, ip_adapter_image=PICTURE) == with_it).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components_manager": {}}, "ComponentsManager"),
        ({"lora_weights": "x"}, "lora_weights"),
        ({"channels_last": True}, "channels_last"),
        ({"offload": "group"}, "offload"),
    ],
)
def test_sharing_with_what_changes_modules_is_refused(plain, options, words):
    with pytest.raises(errors.InvalidOption, match=words):
        bentoml_diffusers.load_model(
            plain, **{"components_manager": ComponentsManager(), **options}
        )


# Mellon


@pytest.fixture
def mellon():
    def call(*arguments):
        return CliRunner().invoke(cli, ["diffusers", "mellon", *map(str, arguments)])

    return call


def test_mellon_nodes_of_blocks_of_diffusers(mellon, plain, tmp_path):
    done = mellon(plain.tag, "-o", tmp_path / "mellon.json")
    assert done.exit_code == 0, done.output
    config = MellonPipelineConfig.load(tmp_path / "mellon.json").to_dict()
    expected = MellonPipelineConfig.from_blocks(StableDiffusionXLAutoBlocks()).to_dict()
    assert config["node_params"] == json.loads(json.dumps(expected["node_params"]))
    assert config["node_params"]["denoise"]["params"]["num_inference_steps"]
    assert config["label"] == plain.tag.name
    part = json.loads(mellon(plain.tag, "--modular-workflow", "text2image").output)
    assert "mask_image" not in part["node_params"]["custom"]["params"]
    assert "num_inference_steps" in part["node_params"]["custom"]["params"]


def test_mellon_of_own_blocks_needs_trust(mellon, with_code, name):
    model = bentoml_diffusers.import_model(name, with_code(f"mellon {name}"))
    refused = mellon(model.tag)
    assert refused.exit_code == 1
    assert "sha256" in refused.output
    config = json.loads(mellon(model.tag, "--trust-remote-code").stdout)
    expected = MellonPipelineConfig.from_custom_block(StableDiffusionXLAutoBlocks())
    assert set(config["node_params"]) == {"custom"}
    assert config["node_params"]["custom"] == json.loads(
        json.dumps(expected.to_dict()["node_params"]["custom"])
    )


def test_mellon_of_a_classic_pipeline_is_one_line(mellon, model):
    done = mellon(model.tag)
    assert done.exit_code == 1
    assert "is no modular pipeline" in done.output
