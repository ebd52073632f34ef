"""Imports from the Hub by the real `huggingface_hub` code, from a stand-in on loopback.

In processes of their own: `huggingface_hub` reads its environment once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest

IMPORT = """
import json, sys
import bentoml_diffusers
try:
    model = bentoml_diffusers.import_model("fromhub", **json.loads(sys.argv[1]))
    bentoml_diffusers.load_model(model)
    print("RESULT", json.dumps({"version": model.tag.version, "path": model.path}))
except Exception as error:
    print("RESULT", json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, pipeline_folder):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(pipeline_folder, root / "full")
    weights = root / "full" / "unet" / "diffusion_pytorch_model.safetensors"
    for junk in ("diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack", "model.onnx"):
        (weights.parent / junk).write_bytes(b"junk")
    (root / "full" / "v1-5-pruned.safetensors").write_bytes(b"a checkpoint in a single file")
    (root / "full" / "v1-5-pruned.ckpt").write_bytes(b"another one")
    for folder in ("unet", "vae", "text_encoder"):
        for file in (root / "full" / folder).glob("*.safetensors"):
            shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text("{}")
    (root / "other" / "model.safetensors").write_bytes(b"large")
    return {"us/full": root / "full", "us/other": root / "other", "us/gated": root / "full"}


@pytest.fixture
def import_from_hub(repositories, tmp_path):
    def run(**arguments):
        environment = {
            **os.environ,
            "BENTOML_HOME": str(tmp_path / "bentoml"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment.pop("HF_HUB_OFFLINE")
        with hub.serve(hub.Hub(repositories, gated=("us/gated",))) as server:
            environment["HF_ENDPOINT"] = server.url
            done = subprocess.run(
                [sys.executable, "-c", IMPORT, json.dumps(arguments)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=200,
            )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, done.stderr
        return json.loads(lines[0].removeprefix("RESULT ")), server.fetched

    return run


def test_only_what_the_pipeline_needs_is_fetched(import_from_hub):
    result, fetched = import_from_hub(model_name_or_path="us/full", sync_with_hub_version=True)
    assert result["version"] == hub.COMMIT, result
    stored = {
        path.name for path in Path(result["path"], "diffusion_model").rglob("*") if path.is_file()
    }
    assert "diffusion_pytorch_model.safetensors" in stored
    for name in (*stored, *fetched):
        assert not name.endswith((".bin", ".msgpack", ".onnx", ".ckpt"))
        assert "pruned" not in name
        assert "fp16" not in name
    assert json.loads(Path(result["path"], "record.json").read_text())["commit"] == hub.COMMIT


def test_a_variant_is_fetched_alone_and_used(import_from_hub):
    result, fetched = import_from_hub(
        model_name_or_path="us/full", variant="fp16", sync_with_hub_version=True
    )
    assert result["version"] == f"{hub.COMMIT}-fp16", result
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert weights
    assert all("fp16" in name for name in weights)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model_name_or_path": "us/none"}, "ModelNotFound", "us/none"),
        ({"model_name_or_path": "us/full", "revision": "v9"}, "ModelNotFound", "v9"),
        ({"model_name_or_path": "us/full", "variant": "fp8"}, "ModelNotFound", "fp8"),
        ({"model_name_or_path": "us/other"}, "InvalidModel", "model_index.json"),
        ({"model_name_or_path": "us/gated"}, "ModelNotFound", "HF_TOKEN"),
    ],
)
def test_what_cannot_be_imported_is_said_before_weights_are_fetched(
    import_from_hub, arguments, error, words, tmp_path
):
    result, fetched = import_from_hub(**arguments)
    assert result["error"] == error, result
    assert words in result["text"]
    assert not [name for name in fetched if name.endswith(".safetensors")]
    assert not (tmp_path / "bentoml" / "models" / "fromhub").exists()
