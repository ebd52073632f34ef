"""`bentoml diffusers workflow show` and `replay`, in this process by click's runner."""

import base64
import hashlib
import io
import json
import re

import pytest
from bentoml_cli.cli import cli
from click.testing import CliRunner
from PIL import Image

import bentoml_diffusers
from bentoml_diffusers import Engine, save_image, testing
from bentoml_diffusers.workflow import Workflow

IMAGE = Image.new("RGB", (16, 8))


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
    IMAGE.save(buffer, "PNG")
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
            save_image(IMAGE, tmp_path / kind, workflow)
        elif kind == "folder":
            workflow.save_workflow(tmp_path / kind)
        else:
            workflow.save_workflow(tmp_path, kind)
        done = run("workflow", "show", tmp_path / kind)
        assert done.exit_code == 0, done.output
        for line in (
            "task img2img",
            "pipeline StableDiffusionImg2ImgPipeline, classic",
            "model demo:abc, files 121212121212, folder pipeline",
            "prompt a red circle",
            "seeds 7",
            "scheduler EulerAncestralDiscreteScheduler (Euler a)",
            "adapter lora outline at 0.8, sha256 abababababab",
            "adapter textual_inversion t as <teal>, sha256 cdcdcdcdcdcd",
            "left out callback_on_step_end: function watch",
            "ran alone, on cpu",
            "made with torch 2.13.0",
        ):
            assert line in [" ".join(found.split()) for found in done.output.splitlines()]
        assert re.search(r"^image +image RGB 16 x 8 \d+ bytes, sha256 ", done.output, re.MULTILINE)
        assert "latents" not in done.output

    def test_text_of_an_untrusted_workflow_does_nothing_to_the_terminal(self, run, tmp_path):
        workflow = make_workflow(arguments={"prompt": "a\x1b]0;title\x07b\nmodel  other"})
        save_image(IMAGE, tmp_path / "a.png", workflow)
        output = run("workflow", "show", tmp_path / "a.png").output
        assert r" a\x1b]0;title\x07b\nmodel  other" in output
        assert "\x1b" not in output

    def test_json(self, run, tmp_path):
        workflow = make_workflow(arguments={"prompt": "a\x1b]0;title\x07b"})
        save_image(IMAGE, tmp_path / "a.png", workflow)
        output = run("workflow", "show", tmp_path / "a.png", "--output", "json").output
        assert "\x1b" not in output
        shown = json.loads(output)
        assert shown == json.loads(workflow.to_json(inline_blobs=False))
        assert shown["arguments"]["prompt"] == "a\x1b]0;title\x07b"
        assert "blobs" not in shown

    def test_image_without_a_workflow(self, run, tmp_path):
        IMAGE.save(tmp_path / "a.png")
        done = run("workflow", "show", tmp_path / "a.png")
        assert done.exit_code == 1
        assert done.output.startswith("Error: workflow: got 'an image without one'")

    def test_no_file(self, run, tmp_path):
        done = run("workflow", "show", tmp_path / "a.png")
        assert done.exit_code == 1
        assert "Error: 'a.png': no such file, folder or hub repository" in done.output

    def test_newer_version(self, run, tmp_path):
        values = {"format": "bentoml_diffusers.workflow", "version": 99}
        (tmp_path / "a.json").write_text(json.dumps(values))
        done = run("workflow", "show", tmp_path / "a.json")
        assert done.exit_code == 1
        assert "workflow.version: got 99, expected up to 1: upgrade" in done.output


CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 7, "exclusive": True}


@pytest.fixture(scope="module")
def lora(lora_dir):
    return bentoml_diffusers.import_lora("replayed-lora", lora_dir / "one.safetensors")


@pytest.fixture(scope="module")
def generated(model, lora, tmp_path_factory):
    """Results of an engine, and a folder with their images: `plain.png`, `styled.webp` ..."""
    folder = tmp_path_factory.mktemp("generated")
    static = {"lora_weights": [{"name": str(lora.tag), "scale": 0.5}], "torch_dtype": "bfloat16"}
    with Engine.from_model(model, device="cpu") as engine:
        results = {
            "plain.png": engine.run("txt2img", **CALL, return_workflow=True),
            "styled.webp": engine.run(
                "txt2img", **CALL, lora_weights="replayed-lora", return_workflow=True
            ),
            "changed.jpg": engine.run("img2img", **CALL, image=IMAGE_64, return_workflow=True),
            "solver.png": engine.run(
                "txt2img", **CALL, scheduler="DPM++ 2M Karras", return_workflow=True
            ),
            "two.png": engine.run("txt2img", **CALL, num_images_per_prompt=2, return_workflow=True),
        }
    with Engine.from_model(model, device="cpu", **static) as engine:
        results["static.png"] = engine.run("txt2img", **CALL, return_workflow=True)
    for name, result in results.items():
        save_image(result.images[0], folder / name, result.workflow)
    return folder, results


IMAGE_64 = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


class TestReplay:
    @pytest.mark.parametrize(
        "name", ["plain.png", "styled.webp", "changed.jpg", "solver.png", "static.png"]
    )
    def test_same_bytes(self, run, generated, name, tmp_path):
        folder, results = generated
        done = run("replay", folder / name, "-o", tmp_path / "again.png", "--device", "cpu")
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1] == "the same, bit for bit"
        assert "differs" not in done.stdout
        again = Image.open(tmp_path / "again.png")
        assert again.tobytes() == results[name].images[0].tobytes()
        assert Workflow.load(tmp_path / "again.png").output == results[name].workflow.output

    def test_several_images(self, run, generated, tmp_path):
        folder, results = generated
        done = run("replay", folder / "two.png", "-o", tmp_path / "again.png", "--infotext")
        assert done.exit_code == 0, done.output
        for index, image in enumerate(results["two.png"].images):
            again = Image.open(tmp_path / f"again-{index}.png")
            assert again.tobytes() == image.tobytes()
            assert f"Seed: {7 + index}," in again.info["parameters"]

    def test_json_and_nothing_written(self, run, generated, tmp_path):
        path = generated[1]["plain.png"].workflow.save_workflow(tmp_path)
        done = run("replay", path)
        assert done.exit_code == 0, done.output
        assert list(tmp_path.iterdir()) == [path]

    def test_changes(self, run, generated, tmp_path):
        changes = ("--set", "steps=3", "--set", "prompt=a blue = star", "--set", "seed=8")
        done = run("replay", generated[0] / "plain.png", *changes, "-o", tmp_path / "other.png")
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1].startswith("not compared")
        workflow = Workflow.load(tmp_path / "other.png")
        assert workflow.arguments["num_inference_steps"] == 3
        assert workflow.arguments["prompt"] == "a blue = star"
        assert workflow.seeds == [8]

    def test_another_image_goes_in(self, run, generated, tmp_path):
        IMAGE_64.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in.png")
        change = f"image=@{tmp_path}/in.png"
        done = run(
            "replay", generated[0] / "changed.jpg", "--set", change, "-o", tmp_path / "a.png"
        )
        assert done.exit_code == 0, done.output
        again = Workflow.load(tmp_path / "a.png")
        assert again.output != generated[1]["changed.jpg"].workflow.output
        assert again.arguments["image"] != generated[1]["changed.jpg"].workflow.arguments["image"]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("stebs=3", "stebs: got 3, expected a known argument"),
            ("steps=many", "num_inference_steps: got 'many', expected an integer"),
            ("steps", "expected NAME=VALUE"),
            ("=3", "expected NAME=VALUE"),
            ("image=@/no/such/file", "is not an image"),
            ("lora_weights=nothing", "'nothing' was not found"),
            ("scheduler=os.system", "scheduler"),
        ],
    )
    def test_changes_that_cannot_be(self, run, generated, change, reason, tmp_path):
        output = tmp_path / "out.png"
        done = run("replay", generated[0] / "plain.png", "--set", change, "-o", output)
        assert done.exit_code != 0
        assert reason in done.output
        assert not output.exists()

    def test_another_model(self, run, generated, tmp_path):
        other = bentoml_diffusers.save_model("other-weights", testing.tiny_stable_diffusion(seed=3))
        arguments = ("replay", generated[0] / "plain.png", "--model", other.tag)
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert "the workflow cannot be repeated here: workflow.pipeline.model was" in refused.output
        done = run(*arguments, "--no-strict", "-o", tmp_path / "out.png")
        assert done.exit_code == 1
        assert "differs: workflow.pipeline.model was" in done.output
        assert done.output.splitlines()[-1] == "Error: not the same image"
        assert (tmp_path / "out.png").exists()

    def test_model_under_another_tag(self, run, generated, model, tmp_path):
        text = generated[1]["plain.png"].workflow.to_json().replace(str(model.tag), "gone:1")
        (tmp_path / "a.json").write_text(text)
        done = run("replay", tmp_path / "a.json")
        assert done.exit_code == 0, done.output
        tree = generated[1]["plain.png"].workflow.pipeline.model.tree_sha256
        (tmp_path / "a.json").write_text(text.replace(tree, "0" * 64))
        done = run("replay", tmp_path / "a.json")
        assert done.exit_code == 1
        assert "Error: model 'gone:1' is not in the model store; import it from" in done.output

    def test_workflow_of_no_stored_model(self, run, tmp_path):
        save_image(IMAGE, tmp_path / "a.png", make_workflow(pipeline={"class_name": "X"}))
        done = run("replay", tmp_path / "a.png")
        assert done.exit_code == 1
        assert "expected a stored model: give --model TAG" in done.output

    def test_missing_lora(self, run, generated, tmp_path):
        text = generated[1]["styled.webp"].workflow.to_json().replace("replayed-lora", "lost-lora")
        (tmp_path / "a.json").write_text(text)
        done = run("replay", tmp_path / "a.json")
        assert done.exit_code == 1
        assert "'lost-lora" in done.output

    def test_options_of_an_untrusted_workflow(self, run, generated, tmp_path):
        """Only those that change numbers are taken from a file."""
        values = json.loads(generated[1]["plain.png"].workflow.to_json())
        values["pipeline"]["options"] = {"custom_pipeline": "/tmp/evil.py", "lora_dir": "/"}
        (tmp_path / "a.json").write_text(json.dumps(values))
        done = run("replay", tmp_path / "a.json")
        assert done.exit_code == 0, done.output
        assert "differs: workflow.pipeline.options.custom_pipeline was" in done.output

    @pytest.mark.parametrize(
        ("output", "said"), [("a.bmp", "one of .png"), ("nowhere/a.png", "does not exist")]
    )
    def test_output_that_cannot_be(self, run, generated, tmp_path, output, said):
        """Said before anything is generated."""
        done = run("replay", generated[0] / "plain.png", "-o", tmp_path / output)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
