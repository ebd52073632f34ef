"""A model store of its own for the test run, and tiny pipelines of real classes."""

import atexit
import os
import shutil
import tempfile

_HOME = tempfile.mkdtemp(prefix="bentoml-home-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["BENTOML_HOME"] = _HOME
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run fastest on one thread

import contextlib  # noqa: E402 - the environment comes first
import itertools  # noqa: E402
import logging  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from bentoml._internal.configuration.containers import BentoMLContainer  # noqa: E402
from modular_models import generate  # noqa: E402
from prometheus_client import REGISTRY  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

import bentoml_diffusers  # noqa: E402
from bentoml_diffusers import testing  # noqa: E402

_names = itertools.count()


def pytest_collection_modifyitems(config, items):
    """Leaves out what has a target of its own in the Makefile, whatever other marker is named."""
    own = [name for name in ("families", "postgres") if name not in config.option.markexpr]
    many = [item for item in items if any(map(item.get_closest_marker, own))]
    config.hook.pytest_deselected(items=many)
    items[:] = [item for item in items if item not in many]


@pytest.fixture(autouse=True)
def _loggers_speak():
    """BentoML's command line, run in this process, disables every logger of that time."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("bentoml_diffusers") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture
def name():
    """A name that no other test uses."""
    return f"model{next(_names)}"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A tiny Stable Diffusion, saved by diffusers. Not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline")
    testing.tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A tiny SDXL, saved by diffusers as a classic pipeline. Not to be written to."""
    folder = tmp_path_factory.mktemp("sdxl")
    testing.tiny_stable_diffusion_xl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_pixels():
    """What the tiny SDXL generates at the guidance that its blocks have by default."""
    return generate(testing.tiny_stable_diffusion_xl(), guidance_scale=7.5)


@pytest.fixture(scope="session")
def modular_model(sdxl_folder):
    """The tiny SDXL in the model store, as a modular pipeline."""
    return bentoml_diffusers.import_model("modular", sdxl_folder, pipeline_class="ModularPipeline")


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory):
    """A folder with the LoRAs `one.safetensors` and `two.safetensors`. Not to be written to."""
    folder = tmp_path_factory.mktemp("loras")
    testing.save_tiny_lora(folder, "one.safetensors", seed=1)
    testing.save_tiny_lora(folder, "two.safetensors", seed=2)
    return folder


@pytest.fixture(scope="session")
def model(pipeline_folder):
    """A tiny Stable Diffusion in the model store."""
    return bentoml_diffusers.import_model("tiny", pipeline_folder)


@pytest.fixture(scope="module")
def open_service():
    """Answers HTTP in this process, until the block ends."""

    @contextlib.contextmanager
    def open_client(service):
        before = BentoMLContainer.config.get()  # `to_asgi` puts that of the service in its place
        known = set(REGISTRY._collector_to_names)
        try:
            with TestClient(service.to_asgi()) as client:
                yield client
        finally:
            BentoMLContainer.config.set(before)
            for collector in set(REGISTRY._collector_to_names) - known:
                if collector._name.startswith("bentoml_"):  # made anew for each service
                    REGISTRY.unregister(collector)

    return open_client


@pytest.fixture
def run_local():
    """Starts the runner of a model in this process; returns its method as a function."""

    def start(model, method="__call__", **options):
        runner = model.with_options(**options).to_runner()
        runner.init_local(quiet=True)
        return getattr(runner, method).run

    return start


@pytest.fixture
def pixels():
    """Turns an image, or the output of a runner, into an array of integers."""

    def convert(value):
        image = value[0][0] if isinstance(value, tuple) else value
        return np.asarray(image).astype(int)

    return convert
