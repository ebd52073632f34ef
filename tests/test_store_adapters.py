"""LoRAs and textual inversions as entries of the store: found, described, refused, exported."""

import json
import shutil
from pathlib import Path

import bentoml
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import bentoml_diffusers
from bentoml_diffusers import errors, store, testing
from bentoml_diffusers.adapters.sources import AdapterFinder
from bentoml_diffusers.store import hash_file


def record_of(model):
    return store.read_record(Path(model.path))


def save(path, tensors, metadata=None):
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path, metadata=metadata)
    return path


def kohya(rank=4, width=768):
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return {
        f"{block}_to_k.lora_down.weight": (rank, width),
        f"{block}_to_k.lora_up.weight": (320, rank),
        f"{block}_to_k.alpha": (),
        f"{block}_to_out_0.lora_down.weight": (rank, 320),
        f"{block}_to_out_0.lora_up.weight": (320, rank),
        f"{text}.lora_down.weight": (rank, 768),
        f"{text}.lora_up.weight": (768, rank),
    }


def test_a_lora_of_diffusers_is_described(lora_dir, name):
    file = lora_dir / "one.safetensors"
    record = record_of(bentoml_diffusers.import_lora(name, file, base_model="tiny"))
    assert (record.kind, record.origin) == ("lora", "file one.safetensors")
    assert record.files == {"one.safetensors": hash_file(file)}
    assert record.tree
    details = record.details
    assert (details["rank"], details["base_model"]) == (4, "tiny")
    assert details["components"] == {"unet": details["tensors"] // 2}
    assert details["modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert details["architecture"] == "unet with text embeddings of width 16"


def test_a_lora_of_kohya_is_described(tmp_path, name):
    words = {"10_sks dog": {"sks dog": 10}}
    metadata = {"ss_tag_frequency": json.dumps(words), "ss_base_model_version": "sd_v1"}
    path = save(tmp_path / "k.safetensors", kohya(), metadata)
    details = record_of(bentoml_diffusers.import_lora(name, path)).details
    assert details["architecture"] == "stable-diffusion-1"
    assert (details["rank"], details["alpha"]) == (4, 1.0)
    assert details["components"] == {"unet": 2, "text_encoder": 1}
    assert details["modules"] == ["q_proj", "to_k", "to_out.0"]
    assert details["trigger_words"] == ["sks dog"]
    assert details["base_model"] == "sd_v1"


@pytest.mark.parametrize(
    ("tensors", "metadata", "architecture"),
    [
        (kohya(width=2048), None, "sdxl"),
        (kohya(width=1024), None, "stable-diffusion-2"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, None, "flux"),
        ({"transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight": (4, 8)}, None, "stab"),
        (kohya(), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "stable-diff"),
    ],
)
def test_the_architecture_is_recognised(tmp_path, name, tensors, metadata, architecture):
    path = save(tmp_path / "x.safetensors", tensors, metadata)
    details = record_of(bentoml_diffusers.import_lora(name, path)).details
    assert details["architecture"].startswith(architecture)


def test_alpha_and_words_come_from_the_files_own_metadata(tmp_path, name):
    config = {"unet.r": 4, "unet.lora_alpha": 8}
    metadata = {
        "lora_adapter_metadata": json.dumps(config),
        "modelspec.trigger_phrase": "sks, in the style of x",
    }
    path = save(tmp_path / "x.safetensors", {"unet.a.to_q.lora_A.weight": (4, 8)}, metadata)
    details = record_of(bentoml_diffusers.import_lora(name, path)).details
    assert details["alpha"] == 8.0
    assert details["trigger_words"] == ["sks", "in the style of x"]


def test_files_are_found_in_folders(tmp_path, lora_dir, name):
    with pytest.raises(errors.InvalidModel, match=r"one\.safetensors, two\.safetensors.*weight_n"):
        bentoml_diffusers.import_lora(name, lora_dir)
    model = bentoml_diffusers.import_lora(name, lora_dir, weight_name="two.safetensors")
    assert list(record_of(model).files) == ["two.safetensors"]
    shutil.copy(lora_dir / "one.safetensors", tmp_path)
    assert list(record_of(bentoml_diffusers.import_lora(name, tmp_path)).files) == [
        "one.safetensors"
    ]


@pytest.mark.parametrize(
    ("weight_name", "words"),
    [("../one.safetensors", "outside"), ("/etc/passwd", "outside"), ("no.safetensors", "no file")],
)
def test_a_name_leads_nowhere_else(lora_dir, tmp_path, name, weight_name, words):
    shutil.copytree(lora_dir, tmp_path / "in")
    shutil.copy(lora_dir / "one.safetensors", tmp_path)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_lora(name, tmp_path / "in", weight_name=weight_name)


def test_a_link_out_of_the_folder_is_refused(lora_dir, tmp_path, name):
    (tmp_path / "x.safetensors").symlink_to(lora_dir / "one.safetensors")
    with pytest.raises(errors.InvalidModel, match="points outside"):
        bentoml_diffusers.import_lora(name, tmp_path)


@pytest.mark.parametrize("source", ["missing.safetensors", "/nowhere/x", "a/b/c", "./x"])
def test_what_is_not_there_is_not_found(name, source):
    with pytest.raises(errors.ModelNotFound):
        bentoml_diffusers.import_lora(name, source)


def test_pickles_are_refused_or_stored_as_safetensors(lora_dir, tmp_path, name):
    tensors = load_file(lora_dir / "one.safetensors")
    path = tmp_path / "old.bin"
    torch.save(tensors, path)
    with pytest.raises(errors.UntrustedSource, match="allow_pickle=True"):
        bentoml_diffusers.import_lora(name, path)
    model = bentoml_diffusers.import_lora(name, path, allow_pickle=True)
    assert bentoml_diffusers.import_lora(name, path, allow_pickle=True).tag == model.tag
    found = store.find_adapter(str(model.tag), "lora")
    assert found.path.name == "old.safetensors"
    assert record_of(model).details["rank"] == 4
    stored = load_file(found.path)
    assert all(torch.equal(stored[key], value) for key, value in tensors.items())


def test_a_name_always_finds_what_the_store_holds_now(lora_dir, name):
    def found():
        adapter = store.find_adapter(name, "lora")
        return adapter and adapter.tag

    assert found() is None
    first = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")
    assert found() == str(first.tag)
    assert found() == str(first.tag)
    second = bentoml_diffusers.import_lora(name, lora_dir / "two.safetensors")
    assert found() == str(second.tag)
    assert store.find_adapter(str(first.tag), "lora").tag == str(first.tag)
    bentoml.models.delete(str(second.tag))
    assert found() == str(first.tag)
    assert store.find_adapter(str(second.tag), "lora") is None
    bentoml.models.delete(str(first.tag))
    assert found() is None


def test_a_name_of_another_kind_is_not_found(lora_dir, tmp_path, name, model):
    save_file({"<cat>": torch.randn(2, 768)}, tmp_path / "cat.safetensors")
    bentoml_diffusers.import_textual_inversion(name, tmp_path)
    assert store.find_adapter(name, "textual_inversion").token == "<cat>"
    assert store.has_adapter(name, "textual_inversion")
    for other in (name, str(model.tag)):
        assert store.find_adapter(other, "lora") is None
        assert not store.has_adapter(other.partition(":")[0], "lora")
    for strange in ("..", "a\0b", f"{name}:", "-", "x" * 100, f"{name}:a:b"):
        assert store.find_adapter(strange, "textual_inversion") is None
    bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")  # now the latest
    assert store.find_adapter(name, "textual_inversion") is None
    assert store.has_adapter(name, "textual_inversion")
    assert {name, model.tag.name} <= set(store.list_names())


def test_one_broken_entry_hides_no_other(lora_dir, name, caplog):
    broken = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors")
    Path(broken.path_of("record.json")).write_text("{")
    other = f"{name}-other"
    bentoml_diffusers.import_lora(other, lora_dir / "one.safetensors")
    assert store.find_adapter(name, "lora") is None
    assert not store.has_adapter(name, "lora")
    assert store.has_adapter(other, "lora")
    listed = {model.tag for model, _ in store.list_records()}
    assert broken.tag not in listed
    assert bentoml.models.get(other).tag in listed
    assert f"skipped: '{broken.tag}' has a broken record.json" in caplog.text
    bentoml.models.delete(str(broken.tag))


def test_a_textual_inversion_is_described(tmp_path, name):
    save_file({"<cat>": torch.randn(2, 768)}, tmp_path / "cat.safetensors")
    record = record_of(bentoml_diffusers.import_textual_inversion(name, tmp_path))
    assert record.details == {
        "token": "<cat>",
        "vectors": 2,
        "length": 768,
        "architecture": "stable-diffusion-1",
        "sources": record.details["sources"],
    }
    other = bentoml_diffusers.import_textual_inversion(name, tmp_path, token="<dog>")
    assert record_of(other).details["token"] == "<dog>"


def test_a_textual_inversion_for_two_encoders_is_described(tmp_path, name):
    tensors = {"text_encoders_0": torch.randn(2, 768), "text_encoders_1": torch.randn(2, 1280)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(errors.InvalidModel, match="token="):
        bentoml_diffusers.import_textual_inversion(name, tmp_path)
    model = bentoml_diffusers.import_textual_inversion(name, tmp_path, token="<x>")
    details = record_of(model).details
    assert details["components"] == {"text_encoder": 768, "text_encoder_2": 1280}
    assert (details["token"], details["architecture"]) == ("<x>", "sdxl")


def test_several_embeddings_in_one_file_are_refused_at_once(tmp_path, name):
    save_file({"<x>": torch.randn(1, 16), "<y>": torch.randn(1, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(
        errors.InvalidModel,
        match="must hold exactly one textual inversion; its tensors are <x>, <y>",
    ):
        bentoml_diffusers.import_textual_inversion(name, tmp_path)


def test_an_old_textual_inversion_as_pickle(tmp_path, name, model):
    """The layout of the first web UI: `string_to_param` with the token `*`, and more values."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 16)}}
    torch.save({**content, "name": "word", "step": 1}, tmp_path / "word.pt")
    arguments = {"token": "<old>", "allow_pickle": True}
    with pytest.raises(errors.InvalidModel, match="token="):
        bentoml_diffusers.import_textual_inversion(name, tmp_path / "word.pt", allow_pickle=True)
    entry = bentoml_diffusers.import_textual_inversion(name, tmp_path / "word.pt", **arguments)
    assert record_of(entry).details["token"] == "<old>"
    pipeline = bentoml_diffusers.load_model(model, textual_inversions=name)
    assert "<old>" in pipeline.tokenizer.get_vocab()


def test_another_lora_is_another_version_and_a_full_tag_is_taken_once(lora_dir, name):
    one = bentoml_diffusers.import_lora(f"{name}:v1", lora_dir / "one.safetensors")
    assert bentoml_diffusers.import_lora(one.tag, lora_dir / "one.safetensors").tag == one.tag
    with pytest.raises(errors.TagConflict):
        bentoml_diffusers.import_lora(one.tag, lora_dir / "two.safetensors")
    assert bentoml_diffusers.import_lora(name, lora_dir / "two.safetensors").tag != one.tag


def test_adapters_are_listed_exported_and_imported_like_models(lora_dir, tmp_path, name):
    model = bentoml_diffusers.import_lora(name, lora_dir / "one.safetensors", labels={"a": "b"})
    assert model.info.labels == {"kind": "lora", "a": "b"}
    archive = bentoml.models.export_model(str(model.tag), str(tmp_path / "x.bentomodel"))
    bentoml.models.delete(str(model.tag))
    assert model.tag not in [entry.tag for entry in store.list_entries()]
    again = bentoml.models.import_model(archive)
    assert again.tag in [entry.tag for entry in store.list_entries()]
    assert store.verify(again).is_intact
    assert record_of(again).details["rank"] == 4


def train_by_peft(part, folder, **config):
    """Writes a LoRA as a user of PEFT does, with matrices that do something."""
    model = peft.get_peft_model(part, peft.LoraConfig(init_lora_weights="gaussian", **config))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


CONFIGS = {
    "alphas": {"lora_alpha": 3, "target_modules": ["to_q", "to_k", "conv1"]},
    "patterns": {
        "target_modules": r".*attn\d\.to_[qv]",
        "rank_pattern": {"attn2.to_q": 4},
        "alpha_pattern": {r"^up_blocks\..*": 16},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["to_q", "to_v"], "use_dora": True, "lora_alpha": 5},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_wrote_is_applied_as_peft_does(config, tmp_path):
    call = {"prompt": "a", "num_inference_steps": 1, "output_type": "np"}
    theirs = testing.tiny_stable_diffusion()
    # PEFT's layers are in the pipeline's own modules from here on.
    train_by_peft(theirs.unet, tmp_path / "unet", r=2, **config)
    text = {"target_modules": ["q_proj"], "lora_alpha": 4}
    train_by_peft(theirs.text_encoder, tmp_path / "text_encoder", r=2, **text)
    expected = theirs(**call, generator=torch.Generator().manual_seed(7)).images
    bentoml_diffusers.import_lora("trained", tmp_path)
    with bentoml_diffusers.Engine(testing.tiny_stable_diffusion()) as engine:
        result = engine.run("__call__", **call, seed=7, lora_weights="trained")
        plain = engine.run("__call__", **call, seed=7)
    assert abs(result.output[0] - expected).max() < 5e-6
    assert abs(plain.output[0] - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["unet", "anything"])
def test_the_component_of_a_folder_of_peft_is_found(name, tmp_path):
    folder = tmp_path / name
    train_by_peft(testing.tiny_stable_diffusion().unet, folder, target_modules=["to_q"])
    for source in (folder, folder / "adapter_model.safetensors"):
        details = record_of(bentoml_diffusers.import_lora("trained", source)).details
        assert set(details["components"]) == {"unet"}


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED_PARTS = {
    "does not name its component": lambda folder: edit_config(folder, auto_mapping=None),
    "is not a LoRA according to its": lambda folder: edit_config(folder, peft_type="LOHA"),
    "changes the base model": lambda folder: edit_config(folder, init_lora_weights="pissa"),
    "has a broken": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no readable": lambda folder: (folder / "adapter_model.safetensors").write_text("x"),
    "which is not a LoRA": lambda folder: save_file(
        {"base_model.model.q_proj.weight": torch.ones(2)}, folder / "adapter_model.safetensors"
    ),
}


@pytest.mark.parametrize("reason", REFUSED_PARTS)
def test_folders_of_peft_that_are_more_than_a_lora_are_refused(reason, tmp_path):
    folder = tmp_path / "trained"
    text_encoder = testing.tiny_stable_diffusion().text_encoder
    train_by_peft(text_encoder, folder, target_modules=["q_proj"])
    REFUSED_PARTS[reason](folder)
    with pytest.raises(errors.InvalidModel, match=reason):
        bentoml_diffusers.import_lora("trained", folder)


def test_a_folder_of_peft_below_lora_dir_is_refused_with_the_way(tmp_path):
    train_by_peft(testing.tiny_stable_diffusion().unet, tmp_path / "a", target_modules=["to_q"])
    finder = AdapterFinder("lora", ("lora_dir",), tmp_path)
    with pytest.raises(errors.InvalidModel, match="import_lora"):
        finder.find_all("a/adapter_model.safetensors")


def test_a_suggestion_is_never_the_name_that_was_asked_for():
    message = str(errors.AdapterNotFound("lora_weights", "teal", ["teal", "teal2"]))
    assert "did you mean 'teal2'?" in message
    assert "did you mean" not in str(errors.AdapterNotFound("lora_weights", "x", ["x"]))
