"""From bentofile.yaml to a server in another place, with the commands of its first lines."""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from processes import ROOT
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import testing

PLAIN = {"prompt": "a red circle <odd>", "num_inference_steps": 4, "seed": 1}


# Adapters that the service of the bento is loaded with; `bentofile.yaml` does not name them.
STATIC = """
svc = bentoml_diffusers.service(
    "demo:latest", lora_weights={"name": "fixed", "scale": 0.5}, textual_inversions=["odd:latest"]
)
"""


@pytest.fixture(scope="module")
def static_files(tmp_path_factory):
    """The LoRA and the textual inversion that are static; `later` are others of their names."""
    folder = tmp_path_factory.mktemp("static")
    for seed, name in ((3, "fixed"), (4, "later")):
        testing.save_tiny_lora(folder, f"{name}.safetensors", seed=seed)
        vector = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        save_file({"<odd>": vector}, folder / f"{name}-word.safetensors")
    return folder


@pytest.fixture(scope="module")
def archive(
    tmp_path_factory, run_command, make_home, set_aside, tiny_model, lora_dir, static_files
):
    """A bento in a file, built in a copy of this project from a store that it then leaves."""
    project = tmp_path_factory.mktemp("project")
    for name in ("bentofile.yaml", "services", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    with (project / "services" / "service.py").open("a") as module:
        module.write(STATIC)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", project / "wheels"]
    subprocess.run([*wheel, ROOT], check=True)
    home = make_home(
        tiny_model,
        set_aside(bentoml_diffusers.import_lora("outline", lora_dir / "one.safetensors")),
        set_aside(bentoml_diffusers.import_lora("stripes", lora_dir / "two.safetensors")),
        *import_static(set_aside, static_files, "fixed"),
    )
    built = run_command(
        "build", home=home, folder=project, UV_CONSTRAINT=str(ROOT / "constraints.txt")
    )
    assert built.returncode == 0, built.stderr
    target = tmp_path_factory.mktemp("export") / "diffusers.tar.gz"
    exported = run_command("export", "diffusers:latest", str(target), home=home)
    assert exported.returncode == 0, exported.stderr
    return target


def import_static(set_aside, folder, name):
    """Stores the static adapters `fixed` and `odd`, with what the files of a name hold."""
    lora = set_aside(bentoml_diffusers.import_lora("fixed", folder / f"{name}.safetensors"))
    word = folder / f"{name}-word.safetensors"
    return lora, set_aside(bentoml_diffusers.import_textual_inversion("odd", word))


@pytest.fixture(scope="module")
def bento(archive, tmp_path_factory):
    """The content of the archive."""
    folder = tmp_path_factory.mktemp("bento")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def server(
    archive, bento, serve, run_command, make_home, set_aside, tmp_path_factory, static_files
):
    """The bento in a store that holds later models of its names, running the code of its wheel."""
    model = set_aside(bentoml_diffusers.save_model("demo", testing.tiny_stable_diffusion(seed=9)))
    later = (model, *import_static(set_aside, static_files, "later"))
    home = make_home(*later)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    imported = run_command("import", str(archive), home=home, folder=elsewhere)
    assert imported.returncode == 0, imported.stderr
    for one in later:
        (home / "models" / one.tag.name / "latest").write_text(one.tag.version)
    with zipfile.ZipFile(next((bento / "src" / "wheels").iterdir())) as wheel:
        wheel.extractall(elsewhere / "installed")
    with (elsewhere / "installed" / "bentoml_diffusers" / "__init__.py").open("a") as module:
        module.write("print('code of the wheel', flush=True)\n")
    with serve(
        "diffusers:latest", home=home, folder=elsewhere, PYTHONPATH=str(elsewhere / "installed")
    ) as running:
        yield running


def test_generates_with_the_models_that_it_was_built_with(
    server, tiny_model, static_files, open_image
):
    static = {
        "lora_weights": {"name": str(static_files / "fixed.safetensors"), "scale": 0.5},
        "textual_inversions": str(static_files / "fixed-word.safetensors"),
    }
    with bentoml_diffusers.Engine.from_model(tiny_model, **static) as engine:
        expected = engine.run("txt2img", **PLAIN, guidance_scale=3.0).images[0]
    generated = open_image(server.generate(**PLAIN, guidance_scale=3.0))
    # Other processes use other numbers of threads, which sum in another order.
    difference = np.abs(np.asarray(generated).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


def test_loras_came_along(server):
    images = {server.generate(lora_weights=[{"name": name}]) for name in ("outline", "stripes")}
    assert len(images | {server.generate()}) == 3


def test_code_is_that_of_the_wheel(server):
    assert "code of the wheel" in server.log


def test_wheel_holds_the_whole_package(bento):
    with zipfile.ZipFile(next((bento / "src" / "wheels").iterdir())) as wheel:
        packed = set(wheel.namelist())
    files = (path for path in (ROOT / "src").rglob("*") if path.is_file())
    names = {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {name for name in names if "__pycache__" not in name} <= packed


def test_archive_holds_all_models(bento, tiny_model):
    names = {path.name for path in (bento / "models").iterdir()}
    assert names == {"demo", "outline", "stripes", "fixed", "odd"}
    assert (bento / "models" / "demo" / tiny_model.tag.version / "model.yaml").is_file()


def test_image_installs_the_wheel_and_the_tested_torch(bento):
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    requirements = (bento / "env" / "python" / "requirements.txt").read_text().splitlines()
    wheel = next((bento / "src" / "wheels").iterdir()).name
    assert f"./wheels/{wheel}" in requirements
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert next(line for line in pinned if line.startswith("torch==")) in requirements
    assert "COPY --chown=bentoml:bentoml ./src/wheels ./src/wheels" in dockerfile
    assert "pip install -r $BENTO_PATH/env/python/requirements.txt" in dockerfile
