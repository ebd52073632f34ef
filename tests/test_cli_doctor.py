"""`bentoml diffusers doctor`: all that is there, and what is broken, without failing."""

import importlib.metadata
import json
import sys
from pathlib import Path

import bentoml
import pytest
import torch
from bentoml_cli.cli import cli
from click.testing import CliRunner

import bentoml_diffusers
from bentoml_diffusers import _compat

CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture
def run():
    def call(*arguments):
        done = CliRunner().invoke(cli, ["diffusers", "doctor", *arguments], prog_name="bentoml")
        assert done.exit_code == 0, done.output
        return done.output

    return call


def test_table_and_json(run, model):
    report = json.loads(run("--output", "json"))
    assert list(report) == ["versions", "devices", "settings", "store", "problems"]
    # The package of a build for CUDA has no "+cu130" in its version, the module has.
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert (report["devices"]["torch_build"] == "CPU") == (torch.version.cuda is None)
    assert report["devices"]["cpu"]["memory_bytes"] > 1e8
    assert report["settings"]["threads"] == torch.get_num_threads()
    assert report["store"]["path"] == str(_compat.model_store().root)
    assert report["store"]["is_writable"]
    assert report["store"]["entries"]["pipeline"] >= 1
    shown = run()
    for title in ("versions:", "devices:", "settings:", "store:", "problems:"):
        assert title in shown
    assert report["store"]["path"] in shown


def test_a_broken_entry_is_named_and_hides_nothing(run, lora_dir, name):
    tags = []
    for kind in ("record", "file"):
        stored = bentoml_diffusers.import_lora(f"{name}-{kind}", lora_dir / "one.safetensors")
        tags.append(str(stored.tag))
    Path(bentoml_diffusers.get(tags[0]).path, "record.json").write_text("{")
    next(Path(bentoml_diffusers.get(tags[1]).path, "adapter").iterdir()).unlink()
    try:
        report = json.loads(run("--output", "json"))
    finally:
        for tag in tags:
            bentoml.models.delete(tag)
    assert set(tags) <= report["store"]["broken"].keys()  # other tests may have left some, too
    assert "has a broken record.json" in report["store"]["broken"][tags[0]]
    assert "lacks " in report["store"]["broken"][tags[1]]
    assert all(any(tag in problem for problem in report["problems"]) for tag in tags)


def test_a_package_that_cannot_be_imported_hides_nothing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = json.loads(run("--output", "json"))
    assert "torch" in report["devices"]["error"]
    assert report["store"]["path"]
    assert any(problem.startswith("devices: ") for problem in report["problems"])


def test_a_service_that_is_not_there(run):
    report = json.loads(run("--url", CLOSED_PORT, "--output", "json"))
    assert f"no service of this package responds at {CLOSED_PORT}" in report["service"]["error"]
    assert "problems: 1" in run("--url", CLOSED_PORT) or len(report["problems"]) > 1


def test_versions_out_of_bounds_are_named(monkeypatch):
    requires = ["rich>=9999", "no-such-package>=1", "click>=1", "sphinx>=9999; extra == 'docs'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requires)
    rich, missing = _compat.unmet_requirements()
    assert rich.startswith("rich is ")
    assert rich.endswith(", expected >=9999")
    assert missing == "no-such-package is not installed, expected >=1"
