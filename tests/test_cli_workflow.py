"""`bentoml diffusers workflow show`, in this process by click's runner."""

import base64
import hashlib
import io
import json

import pytest
from bentoml_cli.cli import cli
from click.testing import CliRunner
from PIL import Image

from bentoml_diffusers import save_picture
from bentoml_diffusers.workflow import Workflow

PICTURE = Image.new("RGB", (16, 8))


@pytest.fixture(scope="module")
def run():
    def call(*arguments):
        return CliRunner().invoke(cli, ["diffusers", *map(str, arguments)], prog_name="bentoml")

    return call


def make_workflow(**fields):
    values = {
        "format": "bentoml_diffusers.workflow",
        "version": 1,
        "task": "img2img",
        "pipeline": {
            "class_name": "StableDiffusionImg2ImgPipeline",
            "model": {"tag": "demo:abc", "tree_sha256": "12" * 32, "origin": "folder pipeline"},
        },
        "arguments": {"prompt": "a red circle", "num_inference_steps": 20, "latents": None},
        "seeds": [7],
        "scheduler": {"class_name": "EulerAncestralDiscreteScheduler", "config": {}},
        "adapters": [
            {"kind": "lora", "name": "outline", "scale": 0.8, "sha256": "ab" * 32},
            {"kind": "textual_inversion", "name": "t", "token": "<teal>", "sha256": "cd" * 32},
        ],
        "unsupported": {"callback_on_step_end": "function watch"},
        "environment": {"versions": {"torch": "2.13.0"}, "hardware": {"device": "cpu"}},
        **fields,
    }
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    name = hashlib.sha256(buffer.getvalue()).hexdigest()
    image = {"$kind": "image", "blob": name, "mode": "RGB", "size": [16, 8]}
    values["arguments"] = {"image": image, **values["arguments"]}
    values["blobs"] = {name: base64.b64encode(buffer.getvalue()).decode()}
    return Workflow.from_json(json.dumps(values))


class TestShow:
    @pytest.mark.parametrize("kind", ["a.png", "a.jpg", "a.webp", "a.json", "a.zip", "folder"])
    def test_any_file(self, run, tmp_path, kind):
        workflow = make_workflow()
        if kind.endswith((".png", ".jpg", ".webp")):
            save_picture(PICTURE, tmp_path / kind, workflow)
        elif kind == "folder":
            workflow.save_workflow(tmp_path / kind)
        else:
            workflow.save_workflow(tmp_path, kind)
        done = run("workflow", "show", tmp_path / kind)
        assert done.exit_code == 0, done.output
        for line in (
            "task         img2img",
            "pipeline     StableDiffusionImg2ImgPipeline, classic",
            "model        demo:abc, files 121212121212, folder pipeline",
            "prompt       a red circle",
            "seeds        7",
            "scheduler    EulerAncestralDiscreteScheduler (Euler a)",
            "adapter      lora outline at 0.8, sha256 abababababab",
            "adapter      textual_inversion t as <teal>, sha256 cdcdcdcdcdcd",
            "left out     callback_on_step_end: function watch",
            "ran          alone, on cpu",
            "made with    torch 2.13.0",
        ):
            assert line in done.output.splitlines()
        assert "\nimage        image RGB 16 x 8 " in done.output
        assert "latents" not in done.output

    def test_text_of_a_stranger_does_nothing_to_the_terminal(self, run, tmp_path):
        workflow = make_workflow(arguments={"prompt": "a\x1b]0;title\x07b\nmodel  other"})
        save_picture(PICTURE, tmp_path / "a.png", workflow)
        output = run("workflow", "show", tmp_path / "a.png").output
        assert r"prompt       a\x1b]0;title\x07b\nmodel  other" in output
        assert "\x1b" not in output

    def test_picture_without_a_workflow(self, run, tmp_path):
        PICTURE.save(tmp_path / "a.png")
        done = run("workflow", "show", tmp_path / "a.png")
        assert done.exit_code == 1
        assert done.output.startswith("Error: workflow: got 'a picture without one'")

    def test_no_file(self, run, tmp_path):
        done = run("workflow", "show", tmp_path / "a.png")
        assert done.exit_code == 1
        assert "Error: model 'a.png' is no workflow: no such file or folder" in done.output

    def test_newer_version(self, run, tmp_path):
        values = {"format": "bentoml_diffusers.workflow", "version": 99}
        (tmp_path / "a.json").write_text(json.dumps(values))
        done = run("workflow", "show", tmp_path / "a.json")
        assert done.exit_code == 1
        assert "workflow.version: got 99, expected up to 1: upgrade" in done.output
