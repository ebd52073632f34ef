"""Servers and commands as real processes, over tiny pipelines, with model stores of their own."""

import io
import os
import shutil
import subprocess
import sys

import bentoml
import pytest
from PIL import Image
from processes import BENTOML, ROOT, start_server

import bentoml_diffusers
from bentoml_diffusers import testing

_SIGNATURES = {
    name: {"batchable": False} for name in ("__call__", "text2img", "img2img", "inpaint")
}


@pytest.fixture(scope="session")
def set_aside(tmp_path_factory):
    """Moves a model out of the store of this test run, where its name can mean another one."""

    def move(model):
        folder = tmp_path_factory.mktemp("model") / model.tag.version
        shutil.copytree(model.path, folder)
        bentoml.models.delete(model.tag)
        return bentoml.Model.from_path(folder)

    return move


@pytest.fixture(scope="session")
def make_home(tmp_path_factory):
    """Makes a folder for BENTOML_HOME with copies of models."""

    def make(*models):
        home = tmp_path_factory.mktemp("home")
        for model in models:
            target = home / "models" / model.tag.name
            shutil.copytree(model.path, target / model.tag.version)
            (target / "latest").write_text(model.tag.version)
        return home

    return make


@pytest.fixture(scope="session")
def tiny_model(set_aside):
    """A tiny Stable Diffusion named `demo`, as the services know it."""
    return set_aside(
        bentoml_diffusers.save_model(
            "demo", testing.tiny_stable_diffusion(), signatures=_SIGNATURES
        )
    )


@pytest.fixture(scope="session")
def tiny_home(make_home, set_aside, tiny_model, lora_dir):
    """A store with the tiny `demo`, and the LoRA `tiny-lora` for it. Not to be written to."""
    lora = bentoml_diffusers.import_lora("tiny-lora", lora_dir / "one.safetensors")
    return make_home(tiny_model, set_aside(lora))


@pytest.fixture(scope="session")
def environment():
    """Makes the environment of a process that knows this package only as it is installed."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key != "PYTHONPATH" and not key.startswith("BENTOML_")
    }
    # An environment that was made for another checkout would serve that one's code.
    find = "import importlib.util; print(importlib.util.find_spec('bentoml_diffusers').origin)"
    installed = subprocess.run(
        [sys.executable, "-c", find],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.stdout.strip() == bentoml_diffusers.__file__, installed

    def make(home, **more):
        return {
            **inherited,
            "BENTOML_HOME": str(home),
            "BENTOML_DO_NOT_TRACK": "True",
            **more,
        }

    return make


@pytest.fixture(scope="session")
def serve(tmp_path_factory, environment):
    """Runs `bentoml serve TARGET`, or another command that serves, until the block ends."""

    def start(*target, home, command=("serve",), folder=ROOT / "services", **env):
        log_path = tmp_path_factory.mktemp("server") / "log.txt"
        return start_server([*command, *target], folder, environment(home, **env), log_path)

    return start


@pytest.fixture(scope="session")
def demo_server(serve, make_home):
    """`bentoml diffusers demo`, whose images hold their workflows."""
    with serve(home=make_home(), command=("diffusers", "demo")) as running:
        yield running


@pytest.fixture(scope="session")
def run_command(environment):
    """Runs a command of `bentoml` and returns what became of it."""

    def run(*words, home, folder=ROOT, **env):
        return subprocess.run(
            [BENTOML, *words],
            cwd=folder,
            env=environment(home, **env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def open_image():
    """Opens the body of an answer."""

    def open_bytes(body):
        image = Image.open(io.BytesIO(body))
        image.load()
        return image

    return open_bytes


@pytest.fixture(scope="session")
def encode():
    """Encodes an image of one colour into the bytes of a file."""

    def to_bytes(image_format="PNG", mode="RGB", size=(32, 32), colour=None):
        buffer = io.BytesIO()
        Image.new(mode, size, colour or 120).save(buffer, image_format)
        return buffer.getvalue()

    return to_bytes


def pytest_collection_modifyitems(items):
    """Whatever is below this folder starts processes."""
    for item in items:
        if ROOT / "tests" / "services" in item.path.parents:
            item.add_marker(pytest.mark.slow)
