"""How many threads a worker of a legacy runner takes."""

import os
import subprocess
import sys

import pytest
from bentoml._internal.runner.strategy import THREAD_ENVS


@pytest.fixture
def make_runner(model, monkeypatch):
    """A runner of the tiny model, in an environment with these settings of threads only."""

    def make(**settings):
        for name in THREAD_ENVS:
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return model.to_runner()

    return make


def count_threads(runner):
    """The threads that torch takes in a process with the environment of the runner's worker."""
    return int(
        subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
            env={**os.environ, **runner.scheduled_worker_env_map[0]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_operator_sets_holds(make_runner, name):
    assert count_threads(make_runner(**{name: "1"})) == 1


def test_otherwise_bentoml_decides(make_runner):
    assert set(THREAD_ENVS) < set(make_runner().scheduled_worker_env_map[0])


def test_other_settings_of_a_worker_stay(make_runner):
    assert make_runner(OMP_NUM_THREADS="1").scheduled_worker_env_map[0] == {
        "CUDA_VISIBLE_DEVICES": "-1"
    }
