"""Code that comes with a model: stored, hashed, trusted or refused, and never mixed up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bentoml
import pytest
import yaml
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import errors, store

EXAMPLE = Path(__file__).parents[1] / "examples" / "mega"
CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
CODE = """
from diffusers import StableDiffusionPipeline

Sizes = list[int]  # counts as a class on Python 3.10

class {name}(StableDiffusionPipeline):
    word = "{word}"

    def say(self):
        return self.word
"""


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path):
    """diffusers copies custom code to a cache that all models share; here nothing may go there."""
    from diffusers.utils import constants, dynamic_modules_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(constants, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(cache))
    yield
    assert not cache.exists()


@pytest.fixture
def write(tmp_path):
    """Writes a custom pipeline; returns its file."""

    def run(word, *, folder="one", file="pipeline.py", name="Ours"):
        path = tmp_path / folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(name=name, word=word))
        return path

    return run


@pytest.fixture
def trusting(pipeline_folder, name):
    """Imports the tiny pipeline with code, trusted."""

    def run(code, tag=None, **more):
        more.setdefault("trust_remote_code", True)
        return bentoml_diffusers.import_model(
            tag or name, pipeline_folder, custom_pipeline=str(code), **more
        )

    return run


def test_a_file_and_a_folder_are_stored_and_run(trusting, write, name):
    file = trusting(write("file"), f"{name}-file")
    folder = trusting(write("folder", folder="two").parent, f"{name}-folder")
    assert bentoml_diffusers.load_model(file).say() == "file"
    assert bentoml_diffusers.load_model(folder).say() == "folder"
    record = store.read_record(Path(file.path))
    assert record.code.sha256 == store.hash_code(Path(file.path, "code"))
    assert store.verify(file).is_intact


def test_the_code_in_the_store_runs_not_the_file_it_came_from(trusting, write):
    path = write("before")
    model = trusting(path)
    path.write_text("raise SystemExit('it ran')")
    assert bentoml_diffusers.load_model(model).say() == "before"


def test_two_models_with_a_pipeline_py_each_never_mix(trusting, write, name):
    one = bentoml_diffusers.load_model(trusting(write("one"), f"{name}-1"))
    two = bentoml_diffusers.load_model(trusting(write("two", folder="b"), f"{name}-2"))
    assert (one.say(), two.say()) == ("one", "two")
    assert type(one).__module__ != type(two).__module__
    assert type(one).__module__.startswith("_bentoml_diffusers_code_")
    again = bentoml_diffusers.load_model(f"{name}-1")
    assert type(again) is type(one)


def test_files_of_one_folder_import_each_other(trusting, write, tmp_path):
    path = write("x", folder="many")
    (tmp_path / "many" / "helper.py").write_text("WORD = 'from the helper'\n")
    path.write_text("from .helper import WORD\n" + path.read_text().replace('"x"', "WORD"))
    model = trusting(path.parent)
    assert bentoml_diffusers.load_model(model).say() == "from the helper"
    assert sorted(os.listdir(Path(model.path, "code"))) == ["helper.py", "pipeline.py"]


def test_without_trust_it_is_refused_with_file_and_hash(trusting, write, caplog):
    model = trusting(write("untrusted"), trust_remote_code=False)
    assert "brings code that is not trusted" in caplog.text
    digest = store.read_record(Path(model.path)).code.sha256
    with pytest.raises(errors.UntrustedSource) as caught:
        bentoml_diffusers.load_model(model)
    assert digest in str(caught.value)
    assert "pipeline.py" in str(caught.value)
    assert bentoml_diffusers.load_model(model, trust_remote_code=True).say() == "untrusted"
    with pytest.raises(errors.UntrustedSource):
        bentoml_diffusers.load_model(model)


@pytest.mark.slow
def test_trust_does_not_travel(trusting, write, tmp_path):
    """Exported and imported elsewhere, where nobody has trusted this code; also if it says so."""
    model = trusting(write("travelling"))
    archive = bentoml.models.export_model(str(model.tag), str(tmp_path / "x.bentomodel"))
    code = f"""
import bentoml, bentoml_diffusers, pathlib, yaml
model = bentoml.models.import_model({archive!r})
path = pathlib.Path(model.path, "model.yaml")
content = yaml.safe_load(path.read_text())
content["options"] = {{**content["options"], "trust_remote_code": True}}
path.write_text(yaml.safe_dump(content))
model = bentoml_diffusers.get({str(model.tag)!r})
for given in ({{}}, {{"trust_remote_code": True}}):
    try:
        print(bentoml_diffusers.load_model(model, **given).say())
    except bentoml_diffusers.errors.UntrustedSource as error:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "BENTOML_HOME": str(tmp_path / "other")},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout.split() == ["refused", "travelling"], done.stderr[-2000:]


def test_trust_counts_in_with_options_but_not_in_stored_options(trusting, write, run_local):
    model = trusting(write("options"), trust_remote_code=False)
    run = run_local(model, trust_remote_code=True)
    assert run(**CALL)[0][0].size == (32, 32)
    with pytest.raises(errors.InvalidOption, match="trust_remote_code"):
        trusting(write("options"), options={"trust_remote_code": True})
    assert "trust_remote_code" not in str(
        yaml.safe_load(Path(model.path, "model.yaml").read_text())
    )


def test_changed_code_is_refused(trusting, write):
    model = trusting(write("changed"))
    path = Path(model.path, "code", "pipeline.py")
    path.write_text(path.read_text().replace("changed", "evil"))
    with pytest.raises(errors.InvalidModel, match="code that was changed"):
        bentoml_diffusers.load_model(model, trust_remote_code=True)
    assert store.verify(model).changed == ("code",)


def test_nothing_is_written_beside_the_code(trusting, write):
    model = trusting(write("bytecode"))
    before = sorted(Path(model.path).rglob("*"))
    bentoml_diffusers.load_model(model)
    assert sorted(Path(model.path).rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", "must define one pipeline, it has none"),
        ("raise RuntimeError('broken here')", "broken here"),
        (CODE.format(name="A", word="") + CODE.format(name="B", word=""), "A, B"),
    ],
)
def test_code_that_is_no_pipeline_is_one_clear_error(trusting, write, content, words):
    path = write("x")
    path.write_text(content)
    model = trusting(path)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.load_model(model)
    assert not [name for name in sys.modules if name.startswith("_bentoml_diffusers_code_x")]


def test_a_missing_file_is_said_at_import(trusting, tmp_path):
    with pytest.raises(errors.InvalidOption, match="custom_pipeline"):
        trusting(tmp_path / "missing.py")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.InvalidOption, match=r"pipeline\.py"):
        trusting(tmp_path / "empty")


def test_code_that_the_index_names_is_stored(pipeline_folder, tmp_path, name):
    folder = tmp_path / "own"
    shutil.copytree(pipeline_folder, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '["my_code", "Ours"]'))
    (folder / "my_code.py").write_text(CODE.format(name="Ours", word="named") + "\nOther = Ours\n")
    model = bentoml_diffusers.import_model(name, folder)
    with pytest.raises(errors.UntrustedSource, match=r"my_code\.py"):
        bentoml_diffusers.load_model(model)
    assert bentoml_diffusers.load_model(model, trust_remote_code=True).say() == "named"
    assert not Path(model.path, "diffusion_model", "my_code.py").exists()


def test_a_file_of_the_model_can_be_named(pipeline_folder, tmp_path, name):
    folder = tmp_path / "own"
    shutil.copytree(pipeline_folder, folder)
    (folder / "extra.py").write_text(CODE.format(name="Ours", word="extra"))
    model = bentoml_diffusers.import_model(
        name, folder, custom_pipeline="extra", trust_remote_code=True
    )
    assert bentoml_diffusers.load_model(model).say() == "extra"


def test_a_component_with_code_is_refused(pipeline_folder, tmp_path, name):
    folder = tmp_path / "own"
    shutil.copytree(pipeline_folder, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers",\n    "UNet2D', '"mine",\n    "UNet2D'))
    (folder / "unet" / "mine.py").write_text("raise SystemExit")
    with pytest.raises(errors.InvalidModel, match=r"unet/mine\.py"):
        bentoml_diffusers.import_model(name, folder)


def test_other_code_is_another_model(trusting, write):
    first = trusting(write("first"))
    assert trusting(write("first")).tag == first.tag
    assert trusting(write("second")).tag != first.tag
    with pytest.raises(errors.TagConflict):
        trusting(write("third"), first.tag)


def test_a_pipeline_of_ones_own_is_saved_with_its_code(trusting, write, name):
    loaded = bentoml_diffusers.load_model(trusting(write("saved")))
    model = bentoml_diffusers.save_model(f"{name}-saved", loaded)
    again = bentoml_diffusers.load_model(model)
    assert again.say() == "saved"
    assert store.read_record(Path(model.path)).code.class_name == "Ours"


def test_code_at_load_needs_trust_and_runs_privately(model, write):
    path = write("late")
    with pytest.raises(errors.UntrustedSource, match="sha256"):
        bentoml_diffusers.load_model(model, custom_pipeline=str(path))
    trusted = {"custom_pipeline": str(path), "trust_remote_code": True}
    assert bentoml_diffusers.load_model(model, **trusted).say() == "late"
    legacy = {
        "custom_pipeline": str(path),
        "load_pretrained_extra_kwargs": {"trust_remote_code": True},
    }
    assert bentoml_diffusers.load_model(model, **legacy).say() == "late"


@pytest.mark.parametrize("argument", ["custom_pipeline", "use_safetensors"])
def test_extra_arguments_are_no_way_around(model, argument):
    with pytest.raises(errors.InvalidOption, match=argument):
        bentoml_diffusers.load_model(model, load_pretrained_extra_kwargs={argument: "x"})


def test_a_community_name_needs_trust(model):
    with pytest.raises(errors.UntrustedSource, match="trust_remote_code"):
        bentoml_diffusers.load_model(model, custom_pipeline="lpw_stable_diffusion")


def test_the_example_works_through_runner_methods(pipeline_folder, name, run_local, pixels):
    methods = ("text2img", "img2img", "inpaint")
    model = bentoml_diffusers.import_model(
        name,
        pipeline_folder,
        custom_pipeline=str(EXAMPLE),
        trust_remote_code=True,
        signatures={method: {} for method in methods},
    )
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    images = {"image": image, "strength": 0.9}
    runner = model.to_runner()
    runner.init_local(quiet=True)
    bundled = bentoml_diffusers.Engine.from_model(model, custom_pipeline="stable_diffusion_mega")
    with bundled:
        for method, more in zip(
            methods, ({}, images, {**images, "mask_image": image}), strict=True
        ):
            ours = pixels(getattr(runner, method).run(**CALL, **more))
            assert (ours == pixels(bundled.run(method, **CALL, **more).images[0])).all()
