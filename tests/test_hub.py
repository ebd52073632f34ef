"""Imports from the Hub by the real `huggingface_hub` code, from a stand-in on loopback.

In a process of its own, which serves all tests: `huggingface_hub` reads its environment once.
Each test has repositories of its own, so that no cache of another one answers.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import hub
import pytest

WORKER = """
import json, os, sys, time
import bentoml_diffusers
from bentoml_diffusers import store
import huggingface_hub, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # what can be resumed after a cut
calls = {"import_model": bentoml_diffusers.import_model, "import_lora": store.import_lora}
for line in sys.stdin:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(order["environment"])
    huggingface_hub.constants.HF_HUB_OFFLINE = order["offline"]
    started = time.monotonic()
    try:
        model = calls[order["call"]](**order["arguments"])
        if order["load"]:
            bentoml_diffusers.load_model(model)
        result = {"tag": str(model.tag), "version": model.tag.version, "path": model.path}
    except Exception as error:
        result = {"error": type(error).__name__, "text": str(error)}
        result["status"] = int(getattr(error, "error_code", 0))
    print("RESULT", json.dumps({**result, "s": time.monotonic() - started}), flush=True)
"""

_numbers = itertools.count()


@pytest.fixture(scope="module")
def full(tmp_path_factory, pipeline_folder):
    """A repository as people fill them: a pipeline, and all that it does not need."""
    folder = tmp_path_factory.mktemp("hub") / "full"
    shutil.copytree(pipeline_folder, folder)
    for junk in ("diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack", "model.onnx"):
        (folder / "unet" / junk).write_bytes(b"junk")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"a checkpoint in a single file")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"another one")
    (folder / "README.md").write_text("words")
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    return folder


@pytest.fixture(scope="module")
def server():
    with hub.serve(hub.Hub({})) as running:
        yield running


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "BENTOML_HOME": str(home / "bentoml"),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_ENDPOINT": server.url,
    }
    environment.pop("HF_HUB_OFFLINE")
    log = (home / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    process.home = home
    process.log = log
    yield process
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()
    log.close()


@pytest.fixture
def repository(server, full):
    """The id of a repository that no other test has."""
    name = f"us/full{next(_numbers)}"
    server.repositories[name] = full
    server.fetched.clear()
    server.requests.clear()
    server.faults.clear()
    return name


@pytest.fixture
def ask(worker):
    """Imports in the process of the worker; returns what came of it."""

    def run(source, *, call="import_model", load=False, offline=False, environment=None, **more):
        arguments = {"name": f"model{next(_numbers)}", **more}
        arguments["model_name_or_path" if call == "import_model" else "source"] = source
        order = {
            "call": call,
            "arguments": arguments,
            "load": load,
            "offline": offline,
            "environment": environment or {},
        }
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        worker.log.seek(0)
        raise AssertionError(worker.log.read())

    return run


def weights(server):
    return [name for name in server.fetched if name.endswith(".safetensors")]


@pytest.mark.slow
def test_only_what_the_pipeline_needs_is_fetched(ask, server, repository, worker):
    result = ask(repository, sync_with_hub_version=True, load=True)
    assert result["version"] == hub.COMMIT, result
    folder = Path(result["path"], "diffusion_model")
    stored = {path.name for path in folder.rglob("*") if path.is_file()}
    assert "diffusion_pytorch_model.safetensors" in stored
    for name in (*stored, *server.fetched):
        assert not name.endswith((".bin", ".msgpack", ".onnx", ".ckpt", ".md"))
        assert "pruned" not in name
        assert "fp16" not in name
    assert len(server.fetched) == len(set(server.fetched)) + 1  # two are called model.safetensors
    record = json.loads(Path(result["path"], "record.json").read_text())
    assert (record["commit"], record["origin"]) == (hub.COMMIT, repository)
    worker.log.seek(0)
    assert "Fetching" in worker.log.read()  # progress bars


def test_what_comes_from_the_hub_is_linked_and_its_hashes_are_known(ask, repository):
    result = ask(repository)
    large = Path(result["path"], "diffusion_model", "vae", "diffusion_pytorch_model.safetensors")
    assert large.stat().st_size > 64 * 1024
    assert large.stat().st_nlink == 2
    record = json.loads(Path(result["path"], "record.json").read_text())
    from bentoml_diffusers.store import hash_file

    assert record["files"]["vae/diffusion_pytorch_model.safetensors"] == hash_file(large)


def test_a_variant_is_fetched_alone_and_used(ask, server, repository):
    result = ask(repository, variant="fp16", sync_with_hub_version=True, load=True)
    assert result["version"] == f"{hub.COMMIT}-fp16", result
    assert weights(server)
    assert all("fp16" in name for name in weights(server))


def test_a_revision_is_fetched_and_recorded(ask, server, repository, full, tmp_path):
    shutil.copytree(full, tmp_path / "v2")
    (tmp_path / "v2" / "scheduler" / "added.json").write_text("{}")
    server.revisions[f"{repository}@v2"] = tmp_path / "v2"
    result = ask(repository, revision="v2", sync_with_hub_version=True)
    assert result["version"] == hub.OTHER_COMMIT, result
    assert Path(result["path"], "diffusion_model", "scheduler", "added.json").is_file()


def test_the_same_again_is_the_same_model_and_fetches_nothing(ask, server, repository):
    first = ask(repository, name="again")
    server.fetched.clear()
    assert ask(repository, name="again")["tag"] == first["tag"]
    assert ask(repository, name="again", revision=hub.COMMIT)["tag"] == first["tag"]
    assert ask(repository, name="again", variant="fp16")["tag"] != first["tag"]
    assert all("fp16" in name for name in weights(server))


def test_offline_takes_what_is_cached_and_asks_nobody(ask, server, repository):
    first = ask(repository, name="offline")
    server.requests.clear()
    assert ask(repository, name="offline", offline=True)["tag"] == first["tag"]
    missing = ask(f"{repository}-other", offline=True)
    assert missing["error"] == "ModelNotFound"
    assert "HF_HUB_OFFLINE" in missing["text"]
    assert server.requests == []


OFFLINE = """
import bentoml_diffusers
from bentoml_diffusers import errors
for call in (bentoml_diffusers.import_model, bentoml_diffusers.import_lora):
    try:
        call("x", "us/nowhere")
    except errors.ModelNotFound as error:
        print(error)
"""


def test_without_network_the_answer_comes_at_once(tmp_path):
    with socket.socket() as nobody:  # a port that nobody listens on
        nobody.bind(("127.0.0.1", 0))
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE],
            env={
                **os.environ,
                "BENTOML_HOME": str(tmp_path),
                "HF_HOME": str(tmp_path / "hub"),
                "HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}",
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    assert done.stdout.count("check the network") == 2, done.stderr
    assert "Retrying in" not in done.stderr  # as the client of the hub does, for each file


def test_tokens_come_from_the_environment(ask, server, repository):
    server.private = (repository,)
    refused = ask(repository)
    assert (refused["error"], refused["status"]) == ("ModelNotFound", 404)
    assert "HF_TOKEN" in refused["text"]
    assert "version" in ask(repository, environment={"HF_TOKEN": hub.TOKEN})
    wrong = ask(f"{repository}", environment={"HF_TOKEN": "hf_wrong"})
    assert "error" in wrong
    assert "HF_TOKEN" in wrong["text"]
    server.private = ()


def test_proxies_are_used(ask, server, repository):
    """The stand-in is its own proxy: it sees whole addresses instead of paths."""
    assert "version" in ask(repository, proxies={"http": server.url})
    assert server.requests
    assert any(path.startswith("http://") for _, path, _ in server.requests)
    server.requests.clear()
    ask(repository)
    assert not [path for _, path, _ in server.requests if path.startswith("http://")]


def test_a_cut_connection_is_resumed_where_it_was_cut(ask, server, repository):
    name = "vae/diffusion_pytorch_model.safetensors"
    server.faults[f"large{server.repositories[repository]}/{name}"] = ["cut"]
    result = ask(repository, load=True)
    assert "version" in result, result
    ranges = [headers.get("range") for _, path, headers in server.requests if name in path]
    assert any(value and value != "bytes=0-" for value in ranges)


def test_files_that_are_complete_are_not_fetched_again(ask, server, repository):
    """The hub fails in the middle; the second try fetches only the rest."""
    server.faults["diffusion_pytorch_model.safetensors"] = [403] * 4
    failed = ask(repository, name="resumed")
    assert failed["error"] in ("HubUnavailable", "ModelNotFound"), failed
    done = set(server.fetched)
    server.faults.clear()
    server.fetched.clear()
    result = ask(repository, name="resumed")
    assert "version" in result, result
    assert "tokenizer/tokenizer.json" in done
    assert not done & set(server.fetched)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(ask, server, repository, status):
    server.faults["vae/config.json"] = [status]
    assert "version" in ask(repository)


def test_a_hub_that_stays_broken_is_one_clear_error(ask, server, repository):
    server.faults[f"{repository}/revision/{hub.COMMIT}"] = [500] * 20
    result = ask(repository)
    assert (result["error"], result["status"]) == ("HubUnavailable", 503), result
    assert "try again" in result["text"]
    assert not weights(server)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"revision": "v9"}, "ModelNotFound", "v9"),
        ({"variant": "fp8"}, "InvalidModel", "fp8"),
        ({"source": "us/none"}, "ModelNotFound", "us/none"),
        ({"source": "us/other"}, "InvalidModel", "model_index.json"),
        ({"source": "us/gated"}, "ModelNotFound", "HF_TOKEN"),
        ({"source": "us/pickle"}, "UntrustedSource", "allow_pickle"),
        ({"source": "us/lost"}, "InvalidModel", "vae"),
        ({"source": "us/not//valid"}, "ModelNotFound", "us/not//valid"),
    ],
)
def test_what_cannot_be_imported_is_said_before_weights_are_fetched(
    ask, server, repository, special, worker, more, error, words
):
    result = ask(**{"source": repository, "name": "refused", **more})
    assert result["error"] == error, result
    assert words in result["text"]
    assert not weights(server)
    assert not (worker.home / "bentoml" / "models" / "refused").exists()


@pytest.fixture(scope="module")
def special(server, full, tmp_path_factory):
    root = tmp_path_factory.mktemp("special")
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text("{}")
    (root / "other" / "model.safetensors").write_bytes(b"large")
    shutil.copytree(full, root / "pickle")
    for file in (root / "pickle" / "unet").glob("*.safetensors"):
        file.unlink()
    shutil.copytree(full, root / "lost")
    shutil.rmtree(root / "lost" / "vae")
    server.repositories |= {
        "us/other": root / "other",
        "us/gated": full,
        "us/pickle": root / "pickle",
        "us/lost": root / "lost",
    }
    server.gated = ("us/gated",)


def test_a_truncated_file_on_the_hub_is_refused(ask, server, full, tmp_path, worker):
    shutil.copytree(full, tmp_path / "cut")
    path = tmp_path / "cut" / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    server.repositories["us/cut"] = tmp_path / "cut"
    result = ask("us/cut", name="cut")
    assert result["error"] == "InvalidModel", result
    assert "truncated" in result["text"]
    assert not (worker.home / "bentoml" / "models" / "cut").exists()


def test_names_that_lead_out_are_refused_before_anything_is_fetched(ask, server, repository):
    server.more_names = ["unet/../../../../escaped.json"]
    result = ask(repository)
    server.more_names = []
    assert result["error"] == "InvalidModel", result
    assert "escaped.json" in result["text"]
    assert server.fetched == ["model_index.json"]


def test_gated_models_come_with_a_token(ask, server, repository):
    server.gated = (*server.gated, repository)
    assert ask(repository)["error"] == "ModelNotFound"
    assert "version" in ask(repository, environment={"HF_TOKEN": hub.TOKEN})


def test_a_lora_comes_from_the_hub_too(ask, server, lora_dir, tmp_path):
    shutil.copy(lora_dir / "one.safetensors", tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "README.md").write_text("words")
    server.repositories["us/lora"] = tmp_path
    server.fetched.clear()
    result = ask("us/lora", call="import_lora")
    assert "version" in result, result
    record = json.loads(Path(result["path"], "record.json").read_text())
    assert (record["origin"], record["commit"]) == ("us/lora", hub.COMMIT)
    assert server.fetched == ["pytorch_lora_weights.safetensors"]
    assert (
        ask("us/lora", call="import_lora", weight_name="x.safetensors")["error"] == "InvalidModel"
    )


CODE = "from diffusers import StableDiffusionPipeline as Base\n\n\nclass Ours(Base):\n    pass\n"


def test_community_pipelines_need_trust_and_are_stored(ask, server, repository, tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "ours.py").write_text(CODE)
    server.repositories["diffusers/community-pipelines-mirror"] = tmp_path
    refused = ask(repository, custom_pipeline="ours")
    assert refused["error"] == "UntrustedSource"
    assert "trust_remote_code=True" in refused["text"]
    assert "ours.py" not in server.fetched
    result = ask(repository, custom_pipeline="ours", trust_remote_code=True, load=True)
    assert "version" in result, result
    assert Path(result["path"], "code", "pipeline.py").read_text() == CODE
    server.requests.clear()
    unknown = ask(repository, custom_pipeline="theirs", trust_remote_code=True)
    assert unknown["error"] == "InvalidOption"


@pytest.fixture(scope="module")
def modular_full(tmp_path_factory):
    """A tiny modular SDXL as diffusers saves it, and junk beside it."""
    from bentoml_diffusers import testing

    folder = tmp_path_factory.mktemp("hub") / "modular"
    testing.tiny_modular_stable_diffusion_xl().save_pretrained(
        str(folder), overwrite_modular_index=True
    )
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"junk")
    (folder / "README.md").write_text("words")
    return folder


@pytest.fixture
def scattered(server, modular_full, tmp_path):
    """A modular repository whose VAE and tokenizer lie in others, and the ids of all three."""
    ids = [f"us/{kind}{next(_numbers)}" for kind in ("main", "vae", "tokenizer")]
    own = Path(shutil.copytree(modular_full, tmp_path / "main"))
    vae, tokenizer = tmp_path / "vae", tmp_path / "tokenizer"
    (own / "vae").rename(vae)
    (tokenizer / "deep").mkdir(parents=True)
    (own / "tokenizer").rename(tokenizer / "deep" / "down")
    (vae / "README.md").write_text("words")
    (vae / "other").mkdir()
    (vae / "other" / "config.json").write_text("{}")
    path = own / "modular_model_index.json"
    index = json.loads(path.read_text())
    index["vae"][2].update(pretrained_model_name_or_path=ids[1], subfolder="")
    index["tokenizer"][2].update(
        pretrained_model_name_or_path=ids[2], subfolder="deep/down", revision="v2"
    )
    path.write_text(json.dumps(index))
    server.repositories.update(zip(ids, (own, vae, tokenizer), strict=True))
    server.revisions[f"{ids[2]}@v2"] = tokenizer
    server.fetched.clear()
    return ids


def test_what_a_modular_index_names_elsewhere_comes_along(ask, server, scattered):
    own, vae, tokenizer = scattered
    result = ask(own, name="scattered", load=True)
    assert "tag" in result, result
    folder = Path(result["path"], "diffusion_model")
    text = (folder / "modular_model_index.json").read_text()
    assert "us/" not in text
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert not (folder / "vae" / "other").exists()
    assert not any(name.endswith((".bin", ".md")) for name in server.fetched)
    record = json.loads(Path(result["path"], "record.json").read_text())
    assert record["details"]["parts"] == {
        "vae": f"{vae} at {hub.COMMIT}",
        "tokenizer": f"{tokenizer} at {hub.COMMIT}",
    }
    assert record["commit"] == hub.COMMIT
    server.fetched.clear()
    assert ask(own, name="scattered")["tag"] == result["tag"]
    offline = ask(own, name="scattered", offline=True)
    assert offline.get("tag") == result["tag"], offline
    assert not weights(server)


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("/home/somebody/model", "InvalidModel", "/home/somebody/model"),
        ("us/never-there", "ModelNotFound", "us/never-there"),
        ("../us/other", "InvalidModel", "vae"),
    ],
)
def test_what_is_nowhere_is_said_before_anything_large_is_fetched(
    ask, server, scattered, tmp_path, place, error, words
):
    path = tmp_path / "main" / "modular_model_index.json"
    index = json.loads(path.read_text())
    index["vae"][2]["pretrained_model_name_or_path"] = place
    path.write_text(json.dumps(index))
    result = ask(scattered[0])
    assert result.get("error") == error, result
    assert words in result["text"]
    if error == "InvalidModel":
        assert not weights(server)


def test_code_of_blocks_comes_from_the_hub_and_waits_for_trust(ask, server, modular_full, tmp_path):
    name = f"us/blocks{next(_numbers)}"
    folder = Path(shutil.copytree(modular_full, tmp_path / "blocks"))
    (folder / "block.py").write_text(
        "from diffusers import StableDiffusionXLAutoBlocks\n\n\n"
        "class Ours(StableDiffusionXLAutoBlocks):\n    pass\n"
    )
    auto_map = {"ModularPipelineBlocks": "block.Ours"}
    (folder / "modular_config.json").write_text(json.dumps({"auto_map": auto_map}))
    server.repositories[name] = folder
    refused = ask(name, name="hub-blocks", load=True)
    assert refused["error"] == "UntrustedSource", refused
    trusted = ask(name, name="hub-blocks", load=True, trust_remote_code=True)
    assert Path(trusted["path"], "code", "block.py").is_file()


def test_blocks_of_one_repository_run_on_the_pipeline_of_another(ask, server, tmp_path):
    from bentoml_diffusers import testing

    ids = [f"us/{kind}{next(_numbers)}" for kind in ("classic", "blocks")]
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    (blocks / "block.py").write_text(
        "from diffusers import StableDiffusionXLAutoBlocks\n\n\n"
        "class Other(StableDiffusionXLAutoBlocks):\n    pass\n"
    )
    auto_map = {"ModularPipelineBlocks": "block.Other"}
    (blocks / "modular_config.json").write_text(json.dumps({"auto_map": auto_map}))
    testing.tiny_stable_diffusion_xl().save_pretrained(tmp_path / "classic")
    server.repositories.update(zip(ids, (tmp_path / "classic", blocks), strict=True))
    more = {"custom_pipeline": ids[1], "trust_remote_code": True}
    assert ask(ids[0], **more)["error"] == "InvalidOption"
    result = ask(ids[0], **more, pipeline_class="ModularPipeline", load=True)
    record = json.loads(Path(result["path"], "record.json").read_text())
    assert record["code"]["origin"] == ids[1]
    assert ask(ids[1])["error"] == "InvalidModel"  # blocks alone are no pipeline


def test_a_classic_repository_is_stored_as_a_modular_one(ask, server, modular_full, tmp_path):
    from bentoml_diffusers import testing

    name = f"us/classic{next(_numbers)}"
    testing.tiny_stable_diffusion_xl().save_pretrained(tmp_path)
    server.repositories[name] = tmp_path
    result = ask(name, pipeline_class="ModularPipeline", load=True)
    assert Path(result["path"], "diffusion_model", "modular_model_index.json").is_file(), result
