"""From bentofile.yaml to a server in another place, with the commands of its first lines."""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from processes import ROOT

import bentoml_diffusers
from bentoml_diffusers import testing

PLAIN = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def archive(tmp_path_factory, run_command, make_home, set_aside, tiny_model, lora_dir):
    """A bento in a file, built in a copy of this project from a store that it then leaves."""
    project = tmp_path_factory.mktemp("project")
    for name in ("bentofile.yaml", "services", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", project / "wheels"]
    subprocess.run([*wheel, ROOT], check=True)
    home = make_home(
        tiny_model,
        set_aside(bentoml_diffusers.import_lora("outline", lora_dir / "one.safetensors")),
        set_aside(bentoml_diffusers.import_lora("stripes", lora_dir / "two.safetensors")),
    )
    built = run_command(
        "build", home=home, folder=project, UV_CONSTRAINT=str(ROOT / "constraints.txt")
    )
    assert built.returncode == 0, built.stderr
    target = tmp_path_factory.mktemp("export") / "diffusers.tar.gz"
    exported = run_command("export", "diffusers:latest", str(target), home=home)
    assert exported.returncode == 0, exported.stderr
    return target


@pytest.fixture(scope="module")
def bento(archive, tmp_path_factory):
    """The content of the archive."""
    folder = tmp_path_factory.mktemp("bento")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def server(archive, bento, serve, run_command, make_home, set_aside, tmp_path_factory):
    """The bento in a store that holds a later `demo` too, running the code of its own wheel."""
    later = set_aside(bentoml_diffusers.save_model("demo", testing.tiny_stable_diffusion(seed=9)))
    home = make_home(later)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    imported = run_command("import", str(archive), home=home, folder=elsewhere)
    assert imported.returncode == 0, imported.stderr
    (home / "models" / "demo" / "latest").write_text(later.tag.version)
    with zipfile.ZipFile(next((bento / "src" / "wheels").iterdir())) as wheel:
        wheel.extractall(elsewhere / "installed")
    with (elsewhere / "installed" / "bentoml_diffusers" / "__init__.py").open("a") as module:
        module.write("print('code of the wheel', flush=True)\n")
    with serve(
        "diffusers:latest", home=home, folder=elsewhere, PYTHONPATH=str(elsewhere / "installed")
    ) as running:
        yield running


def test_paints_with_the_model_that_it_was_built_with(server, tiny_model, open_picture):
    with bentoml_diffusers.Engine.from_model(tiny_model) as engine:
        expected = engine.run("txt2img", **PLAIN, guidance_scale=3.0).images[0]
    painted = open_picture(server.paint(**PLAIN, guidance_scale=3.0))
    # Other processes use other numbers of threads, which sum in another order.
    difference = np.abs(np.asarray(painted).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


def test_loras_came_along(server):
    pictures = {server.paint(lora_weights=[{"name": name}]) for name in ("outline", "stripes")}
    assert len(pictures | {server.paint()}) == 3


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
    assert names >= {"demo", "outline", "stripes"}
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
