"""`bentoml diffusers import|info|verify|list|lora|embedding`, in this process by click's runner."""

import contextlib
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import bentoml
import diffusers
import pytest
import torch
import transformers
from bentoml_cli.cli import cli
from click.testing import CliRunner
from original import save_checkpoint
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import store, testing
from bentoml_diffusers._logs import quiet_loading


@pytest.fixture
def run():
    def call(*arguments):
        return CliRunner().invoke(cli, ["diffusers", *map(str, arguments)], prog_name="bentoml")

    return call


def test_import_info_and_verify(run, pipeline_folder, name):
    done = run("import", name, pipeline_folder, "--link", "copy")
    assert done.exit_code == 0, done.output
    tag = done.output.splitlines()[-1]
    assert tag.startswith(f"{name}:")
    shown = run("info", tag).output
    record = store.read_record(Path(bentoml_diffusers.get(tag).path))
    for text in (
        tag,
        "StableDiffusionPipeline",
        f"folder {pipeline_folder.name}",
        "unet diffusers.UNet2DConditionModel",
        record.tree,
        *record.files,
        *record.files.values(),
    ):
        assert text in shown
    assert "is intact" in run("verify", tag).output
    path = Path(bentoml_diffusers.get(tag).path, "diffusion_model", "unet", "config.json")
    path.write_text("{}")
    broken = run("verify", tag)
    assert broken.exit_code == 1
    assert "changed: unet/config.json" in broken.output
    bentoml.models.delete(tag)  # other tests look for a model with these files


def test_code_is_shown_with_its_hash_and_trust(run, pipeline_folder, tmp_path, name):
    code = "from diffusers import StableDiffusionPipeline as Base\nclass Ours(Base): ...\n"
    (tmp_path / "pipeline.py").write_text(code + f"# {name}\n")
    arguments = (name, pipeline_folder, "--custom-pipeline", tmp_path)
    run("import", *arguments)
    assert "not trusted in this store" in run("info", name).output
    run("import", *arguments, "--trust-remote-code")
    shown = run("info", name).output
    assert "pipeline.py" in shown
    assert ", trusted here" in shown
    for stored in bentoml.models.list(name):  # other tests look for a model with these files
        bentoml.models.delete(stored.tag)


def test_loras_and_embeddings_are_added_and_listed(run, lora_dir, tmp_path, name):
    save_file({"<cat>": torch.randn(1, 768)}, tmp_path / "cat.safetensors")
    added = run("lora", "add", f"{name}-l", lora_dir, "--weight-name", "one.safetensors")
    assert added.exit_code == 0, added.output
    assert run("embedding", "add", f"{name}-e", tmp_path, "--token", "<dog>").exit_code == 0
    loras, embeddings, everything = (
        run("lora", "list").output,
        run("embedding", "list").output,
        run("list").output,
    )
    assert f"{name}-l" in loras
    assert f"{name}-e" not in loras
    assert "RANK" in loras.splitlines()[0]
    assert "file one.safetensors" in loras or f"folder {lora_dir.name}" in loras
    assert f"{name}-e" in embeddings
    assert "<dog>" in embeddings
    assert f"{name}-l" in everything
    assert f"{name}-e" in everything
    shown = run("info", f"{name}-l").output
    assert re.search(r"^rank +4$", shown, re.MULTILINE)


def test_json_of_what_is_listed(run, lora_dir, name):
    run("lora", "add", f"{name}-l", lora_dir / "one.safetensors")
    tag = str(bentoml_diffusers.get(f"{name}-l").tag)
    for command in (("list",), ("lora", "list")):
        listed = json.loads(run(*command, "--output", "json").output)
        (entry,) = (one for one in listed if one["tag"] == tag)
        assert set(entry) == {"tag", "kind", "class_name", "source", "details"}
        assert entry["kind"] == "lora"
        assert entry["source"] == "file one.safetensors"
        assert entry["details"]["rank"] == 4
    embeddings = json.loads(run("embedding", "list", "--output", "json").output)
    assert tag not in [entry["tag"] for entry in embeddings]


def test_json_of_a_model(run, model):
    facts = json.loads(run("info", model.tag, "--output", "json").output)
    record = store.read_record(Path(model.path))
    assert facts["tag"] == str(model.tag)
    assert facts["class_name"] == "StableDiffusionPipeline"
    assert facts["components"] == record.components
    assert facts["files"] == record.files
    assert facts["code"] is None
    root = Path(model.path, "diffusion_model")
    assert facts["size_bytes"] == sum((root / file).stat().st_size for file in facts["files"])


def test_tables_are_whole_where_no_terminal_is(run, model, monkeypatch):
    """At 20 columns, too: programs read them."""
    monkeypatch.setenv("COLUMNS", "20")
    (line,) = (line for line in run("list").output.splitlines() if str(model.tag) in line)
    assert line.split()[:3] == [str(model.tag), "pipeline", "StableDiffusionPipeline"]


@pytest.mark.parametrize("output", ["table", "json"])
def test_foreign_text_does_nothing_to_the_terminal(run, model, name, lora_dir, output):
    lora = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")
    record = store.read_record(Path(lora.path))
    words = ["\x1b]0;title\x07", "\x9b31m", "[red]", ":smile:", "a\nb", "\x7f"]
    replace(record, details={**record.details, "trigger_words": words}).write(Path(lora.path))
    for command in (("lora", "list"), ("info", name)):
        shown = run(*command, "--output", output).output
        assert not set("\x1b\x07\x9b\x7f") & set(shown)
        assert "[red]" in shown
        assert ":smile:" in shown


def test_errors_speak_of_the_options_of_the_command(run, tmp_path, name):
    testing.tiny_ddpm().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    done = run("import", name, tmp_path)
    assert done.output.rstrip().endswith("asked for None; give --variant")
    torch.save({"w": torch.zeros(1)}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    refused = run("import", name, tmp_path).output
    assert "; --allow-pickle reads tensors" in refused
    assert "allow_pickle" not in refused
    assert "option --config: got" in run("import", name, tmp_path, "--config", "x").output


def test_a_checkpoint_is_read_without_bars(run, tmp_path, name):
    pipeline = testing.tiny_stable_diffusion()
    save_checkpoint(pipeline, tmp_path / "a.safetensors")
    pipeline.save_pretrained(tmp_path / "config")
    done = run("import", name, tmp_path / "a.safetensors", "--config", tmp_path / "config")
    assert done.exit_code == 0, done.output
    assert "\r" not in done.output
    assert "Loading" not in done.output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_stay_on_a_terminal_and_after_the_load(monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    modules = (diffusers.utils.logging, transformers.utils.logging)
    for module in modules:
        monkeypatch.setattr(module, "_tqdm_active", True)
    with contextlib.suppress(KeyError), quiet_loading():
        assert [module.is_progress_bar_enabled() for module in modules] == [is_terminal] * 2
        raise KeyError
    assert all(module.is_progress_bar_enabled() for module in modules)
    assert not logging.getLogger("transformers.utils.import_utils").filters


def test_a_loras_errors_speak_of_its_options(run, lora_dir, name):
    assert "give --weight-name" in run("lora", "add", name, lora_dir).output


@pytest.mark.parametrize("command", [("import",), ("lora", "add"), ("embedding", "add")])
def test_swapped_arguments_are_said(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("./sdxl", "stabilityai/sdxl", tmp_path):
        done = run(*command, source, "my-tag")
        assert done.exit_code == 1
        assert "the tag comes first, then the source" in done.output


def test_a_folder_in_place_of_the_tag_is_said(run, tmp_path, monkeypatch):
    (tmp_path / "sdxl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "'sdxl' is; the tag comes first" in run("import", "sdxl", "my-tag").output


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "no-such-model"),
        ("verify", "no-such-model"),
        ("import", "x", "/nowhere"),
        ("lora", "add", "x", "/nowhere"),
        ("embedding", "add", "x", "/nowhere"),
    ],
)
def test_errors_are_one_line(run, arguments):
    done = run(*arguments)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert "Error: model" in done.output


class TestReproducible:
    @pytest.fixture
    def started(self, monkeypatch):
        """The environment of the server that would have taken this process's place."""
        environments = []
        monkeypatch.setattr(os, "execv", lambda *_: environments.append(dict(os.environ)))
        for variable in ("MKL_CBWR", "BENTOML_DIFFUSERS_TAG", "BENTOML_DIFFUSERS_EMBED"):
            monkeypatch.setenv(variable, "")  # restored after the test
            monkeypatch.delenv(variable)
        return environments

    def test_the_server_gets_it(self, run, model, started):
        assert run("serve", model.tag).exit_code == 0
        assert run("serve", model.tag, "--reproducible").exit_code == 0
        assert [found.get("MKL_CBWR") for found in started] == [None, "AUTO,STRICT"]

    def test_another_setting_is_not_overridden(self, run, model, started, monkeypatch):
        monkeypatch.setenv("MKL_CBWR", "AVX2")
        done = run("serve", model.tag, "--reproducible")
        assert done.exit_code == 2
        assert "MKL_CBWR is 'AVX2' in the environment, expected 'AUTO,STRICT'" in done.output
        assert not started
