"""`bentoml diffusers ...`, and servers that cannot start."""

from processes import ROOT

import bentoml_diffusers


def complain(process, *words):
    """A command failed with one line that says why."""
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if "Warning" not in line]
    assert "Traceback" not in process.stderr
    assert lines[-1].startswith("Error: ")
    for word in words:
        assert word in lines[-1]


def test_help(run_command, tiny_home):
    process = run_command("diffusers", "--help", home=tiny_home)
    assert process.returncode == 0
    for command in ("demo", "hook", "import", "list", "serve"):
        assert f"\n  {command} " in process.stdout


def test_list(run_command, tiny_home, tiny_model):
    process = run_command("diffusers", "list", home=tiny_home)
    assert process.returncode == 0
    rows = {line.split()[0]: line.split()[1:3] for line in process.stdout.splitlines()}
    assert rows[str(tiny_model.tag)] == ["pipeline", "StableDiffusionPipeline"]
    assert next(row for tag, row in rows.items() if tag.startswith("tiny-lora:"))[0] == "lora"


def test_import_then_list(run_command, make_home, pipeline_folder):
    home = make_home()
    process = run_command("diffusers", "import", "mine:one", str(pipeline_folder), home=home)
    assert (process.returncode, process.stdout) == (0, "mine:one\n")
    assert "mine:one" in run_command("diffusers", "list", home=home).stdout


def test_import_of_code_without_trust_says_the_option(
    run_command, make_home, pipeline_folder, tmp_path
):
    (tmp_path / "pipeline.py").write_text("from diffusers import StableDiffusionPipeline\n")
    words = ("mine:one", str(pipeline_folder), "--custom-pipeline", str(tmp_path))
    process = run_command("diffusers", "import", *words, home=make_home())
    assert (process.returncode, process.stdout) == (0, "mine:one\n")
    (said,) = process.stderr.splitlines()
    assert said.startswith("Warning: mine:one brings code that is not trusted")
    assert said.endswith("then import it again with --trust-remote-code")


def test_replay_says_only_what_became_of_it(run_command, tiny_home, tiny_model, tmp_path):
    with bentoml_diffusers.Engine.from_model(tiny_model, device="cpu") as engine:
        result = engine.run("txt2img", prompt="a", num_inference_steps=1, return_workflow=True)
    bentoml_diffusers.save_image(result.images[0], tmp_path / "a.png", result.workflow)
    again = ("--set", "seed=7", "--device", "cpu")
    process = run_command("diffusers", "replay", str(tmp_path / "a.png"), *again, home=tiny_home)
    # An attention backend that another test chose is diffusers' default for this whole process.
    lines = [line for line in process.stdout.splitlines() if "attention_backend" not in line]
    assert lines == ["not compared: there is no hash of the same call"]
    assert process.stderr == ""


def test_import_of_a_folder_without_pipeline(run_command, make_home, tmp_path):
    home = make_home()
    process = run_command("diffusers", "import", "mine", str(tmp_path), home=home)
    complain(process, "model_index.json")
    assert not list((home / "models").glob("mine*"))


def test_serve_unknown_tag(run_command, tiny_home):
    process = run_command("diffusers", "serve", "dem0", home=tiny_home)
    complain(process, "'dem0'", "did you mean 'demo'?")


def test_service_without_its_model_does_not_start(run_command, make_home):
    folder = ROOT / "services"
    modern = run_command("serve", "service:svc", home=make_home(), folder=folder)
    complain(modern, "demo:latest", "not be found")
    legacy = run_command("serve", "legacy_mega:svc", home=make_home(), folder=folder)
    complain(legacy, "'demo:latest' is not in the model store")


def test_service_of_a_lora_does_not_start(run_command, tiny_home):
    complain(
        run_command("diffusers", "serve", "tiny-lora", home=tiny_home), "is a lora, not a pipeline"
    )
