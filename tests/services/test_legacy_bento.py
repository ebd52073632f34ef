"""A legacy service as a bento: built by its recipe, served from another store."""

import io
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

import bentoml_diffusers

CALL = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}
RECIPE = "services/legacy_bentofile.yaml"


@pytest.fixture(scope="module")
def archive(tmp_path_factory, run_command, make_home, set_aside, tiny_model, lora_dir):
    """The bento in a file, with its models."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "services", project / "services")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", project / "wheels"]
    subprocess.run([*wheel, ROOT], check=True)
    loras = (("outline", "one"), ("stripes", "two"))
    imported = (bentoml_diffusers.import_lora(n, lora_dir / f"{f}.safetensors") for n, f in loras)
    home = make_home(tiny_model, *map(set_aside, imported))
    constraint = str(ROOT / "constraints.txt")
    words = ("build", "-f", RECIPE, ".")
    built = run_command(*words, home=home, folder=project, UV_CONSTRAINT=constraint)
    assert built.returncode == 0, built.stderr
    target = tmp_path_factory.mktemp("export") / "legacy.tar.gz"
    exported = run_command("export", "legacy_txt2img:latest", str(target), home=home)
    assert exported.returncode == 0, exported.stderr
    return target


@pytest.fixture(scope="module")
def home(archive, make_home, run_command):
    """A store that nothing but the bento came into."""
    home = make_home()
    imported = run_command("import", str(archive), home=home, folder=archive.parent)
    assert imported.returncode == 0, imported.stderr
    return home


@pytest.fixture(scope="module")
def bento(home):
    folder = home / "bentos" / "legacy_txt2img"
    return folder / (folder / "latest").read_text()


@pytest.fixture(scope="module")
def server(home, bento, serve, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(_wheel_of(bento)) as wheel:
        wheel.extractall(elsewhere)
    with (elsewhere / "bentoml_diffusers" / "__init__.py").open("a") as module:
        module.write("print('code of the wheel', flush=True)\n")
    target = ("legacy_txt2img:latest", "--api-workers", "1")
    with serve(*target, home=home, folder=elsewhere, PYTHONPATH=str(elsewhere)) as running:
        yield running


def _wheel_of(bento: Path):
    return next((bento / "env" / "python" / "wheels").glob("*.whl"))


def test_serves_its_model_with_the_code_of_the_wheel(server, tiny_model, open_image):
    with bentoml_diffusers.Engine.from_model(tiny_model, device="cpu") as engine:
        expected, other = (_as_jpeg(engine, seed) for seed in (1, 2))
    served = np.asarray(open_image(server.generate(**CALL))).astype(int)
    # Another process sums in another order, which a JPEG shows a little more.
    assert np.abs(served - np.asarray(open_image(expected))).mean() < 1
    assert np.abs(served - np.asarray(open_image(other))).mean() > 10
    assert "code of the wheel" in server.log


def _as_jpeg(engine, seed):
    buffer = io.BytesIO()
    engine.run("txt2img", **{**CALL, "seed": seed}).images[0].save(buffer, "JPEG")
    return buffer.getvalue()


def test_loras_came_along(server):
    images = {server.generate(lora_weights=name) for name in ("outline", "stripes")}
    assert len(images | {server.generate()}) == 3


def test_image_has_the_tested_versions_of_what_the_wheel_needs(bento):
    """The wheel is installed after the locked packages, and no constraint is there by then."""
    locked = (bento / "env" / "python" / "requirements.lock.txt").read_text().splitlines()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    names = ("torch", "peft", "accelerate")
    assert {line for line in pinned if line.split("==")[0] in names} <= set(locked)
    install = (bento / "env" / "python" / "install.sh").read_text()
    assert install.index('-r "$REQUIREMENTS_LOCK"') < install.index('"${wheels[@]}"')
    needed = (line for line in requires("bentoml-diffusers") if "extra ==" not in line)
    assert {_plain_name(line) for line in needed} <= {_plain_name(line) for line in locked}


def _plain_name(line):
    return re.match(r"[\w.-]*", line)[0].replace("_", "-").lower()
