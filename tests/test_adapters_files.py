"""Files of adapters: what is read, what is refused, what is remembered."""

import os
import shutil
import threading
import time

import diffusers
import pytest
import torch
from adapter_models import (
    ATTENTION,
    edit,
    generate,
    generate_alone,
    generate_by_peft,
    save_kohya_lora,
    save_lora,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

import bentoml_diffusers
from bentoml_diffusers import ModelOptions, errors, testing
from bentoml_diffusers._compat import reads_lokr
from bentoml_diffusers.adapters import AdapterBank, hash_adapter, supports_lora
from bentoml_diffusers.adapters.cache import HostCache
from bentoml_diffusers.adapters.lycoris import original_name, read_lycoris
from bentoml_diffusers.adapters.raw import RawLora
from bentoml_diffusers.adapters.reader import convert_lora
from bentoml_diffusers.adapters.recorder import Recorder
from bentoml_diffusers.adapters.sources import AdapterFinder, _near
from bentoml_diffusers.demo import LORAS, PIPELINE

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_lora(
        folder / "good.safetensors", testing.tiny_stable_diffusion, {"unet": ATTENTION}, seed=1
    )
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return testing.tiny_stable_diffusion()


def bank_of(pipeline, folder, **options):
    return AdapterBank(pipeline, ModelOptions(lora_dir=str(folder), **options))


def prepare(bank, name):
    return bank.prepare(bank.find(name))


def truncate(folder):
    (folder / "bad.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-100])


def empty(folder):
    (folder / "bad.safetensors").write_bytes(b"")


def no_tensors(folder):
    save_file({}, folder / "bad.safetensors")


def no_lora(folder):
    save_file({"weight": torch.ones(3)}, folder / "bad.safetensors")


def shapes(folder):
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 99)}
    save_file({**tensors, f"{LAYER}.lora_B.weight": torch.ones(16, 4)}, folder / "bad.safetensors")


def outputs(folder):
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 16)}
    save_file({**tensors, f"{LAYER}.lora_B.weight": torch.ones(99, 4)}, folder / "bad.safetensors")


def other_layers(folder):
    lost = LAYER.replace("down_blocks.1", "down_blocks.9")
    tensors = {f"{lost}.lora_A.weight": torch.ones(4, 16)}
    save_file({**tensors, f"{lost}.lora_B.weight": torch.ones(16, 4)}, folder / "bad.safetensors")


def other_architecture(folder):
    save_lora(folder / "bad.safetensors", testing.tiny_flux, {"transformer": ["to_q"]})


def half_a_lora(folder):
    save_file({f"{LAYER}.lora_A.weight": torch.ones(4, 16)}, folder / "bad.safetensors")


def nan(folder):
    def poison(tensors):
        return {**tensors, next(iter(tensors)): torch.full_like(next(iter(tensors.values())), nan)}

    nan = float("nan")
    edit(folder / "good.safetensors", poison, folder / "bad.safetensors")


def kohya_dora(folder):
    layer = LAYER.removeprefix("unet.")
    save_kohya_lora(folder / "bad.safetensors", testing.tiny_stable_diffusion, {"unet": [layer]})
    key = f"lora_unet_{layer.replace('.', '_')}.dora_scale"
    edit(folder / "bad.safetensors", lambda tensors: {**tensors, key: torch.ones(16)})


def lost_loha(folder):
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"lora_unet_nowhere.{part}": torch.ones(4, 4) for part in parts}
    save_file(tensors, folder / "bad.safetensors")


def small_lokr(folder):
    layer = f"lora_unet_{LAYER.removeprefix('unet.').replace('.', '_')}"
    tensors = {f"{layer}.lokr_w1": torch.ones(2, 2), f"{layer}.lokr_w2": torch.ones(3, 3)}
    save_file(tensors, folder / "bad.safetensors")


def half_a_loha(folder):
    layer = f"lora_unet_{LAYER.removeprefix('unet.').replace('.', '_')}"
    save_file({f"{layer}.hada_w1_a": torch.ones(16, 2)}, folder / "bad.safetensors")


def nan_in_lokr(folder):
    layer = f"lora_unet_{LAYER.removeprefix('unet.').replace('.', '_')}"
    bad = torch.full((8, 8), float("nan"))
    save_file(
        {f"{layer}.lokr_w1": torch.ones(2, 2), f"{layer}.lokr_w2": bad},
        folder / "bad.safetensors",
    )


def high_rank(folder):
    save_lora(folder / "bad.safetensors", testing.tiny_stable_diffusion, {"unet": ["to_q"]}, r=12)


BROKEN = {
    truncate: "broken or truncated",
    empty: "broken or truncated",
    no_tensors: "is empty",
    no_lora: "not a LoRA",
    shapes: "another base model",
    outputs: "another base model",
    other_layers: r"no layer unet\.down_blocks\.9",
    other_architecture: "not a LoRA|no layer",
    half_a_lora: "second matrix|not a LoRA",
    nan: "NaN",
    kohya_dora: "DoRA",
    lost_loha: "no layer lora_unet_nowhere",
    small_lokr: "another shape",
    half_a_loha: "incomplete",
    nan_in_lokr: "NaN",
    high_rank: "rank 12, more than max_lora_rank=8",
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_bad_files_are_refused_before_anything_changes(pipeline, folder, make):
    make(folder)
    bank = bank_of(pipeline, folder, max_lora_rank=8)
    plain = generate(pipeline)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    with pytest.raises(errors.InvalidModel, match=BROKEN[make]) as caught:
        prepare(bank, "bad.safetensors")
    assert caught.value.error_code == 400
    assert "bad.safetensors" in str(caught.value)
    assert str(folder) not in str(caught.value)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(generate(pipeline), plain)
    theirs = generate_by_peft(testing.tiny_stable_diffusion, [(folder / "good.safetensors", 1.0)])
    assert (generate_alone(pipeline, bank, "good.safetensors") - theirs).abs().max() < 5e-6
    bank.close()


def test_check_finite_can_be_turned_off(pipeline, folder):
    nan(folder)
    bank = bank_of(pipeline, folder, check_finite=False)
    assert prepare(bank, "bad.safetensors").loras


def test_numbers_too_large_for_the_dtype_of_the_model_are_found(tmp_path):
    tensors = {f"{LAYER}.lora_A.weight": torch.full((4, 16), 1e6)}
    save_file(
        {**tensors, f"{LAYER}.lora_B.weight": torch.ones(16, 4)}, tmp_path / "big.safetensors"
    )
    assert prepare(bank_of(testing.tiny_stable_diffusion(), tmp_path), "big.safetensors").loras
    with pytest.raises(errors.InvalidModel, match="infinity"):
        prepare(
            bank_of(testing.tiny_stable_diffusion().to(dtype=torch.float16), tmp_path),
            "big.safetensors",
        )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("transformer.x_embedder.lora_A.weight", (4, 32)),
        ("transformer.transformer_blocks.0.attn.norm_q.weight", (16,)),
    ],
)
def test_a_control_lora_of_flux_would_write_to_the_base_and_is_refused(tmp_path, key, shape):
    pipeline = testing.tiny_flux()
    good = {
        "transformer.x_embedder.lora_A.weight": torch.ones(4, 16),
        "transformer.x_embedder.lora_B.weight": torch.ones(32, 4),
    }
    save_file({**good, key: torch.ones(shape)}, tmp_path / "control.safetensors")
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    with pytest.raises(errors.InvalidModel, match=r"another base|replace weights"):
        prepare(bank_of(pipeline, tmp_path), "control.safetensors")
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipeline.transformer.x_embedder.in_features == 16


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ([{"name": "good.safetensors", "scale": "abc"}], errors.InvalidRequest, "scale"),
        ([{"name": "good.safetensors", "scale": 1e9}], errors.InvalidRequest, "scale"),
        ([{"name": "good.safetensors", "scale": 10**400}], errors.InvalidRequest, "scale"),
        ({"name": "x" * 300, "weight_name": "x.safetensors"}, errors.AdapterNotFound, "not found"),
        ([{"name": "good.safetensors", "scale": float("nan")}], errors.InvalidRequest, "scale"),
        (["good.safetensors"] * 100, errors.InvalidRequest, "at most"),
        ([{"name": "good.safetensors", "adapter_name": "x"}], errors.InvalidRequest, "only the"),
        ([{"name": "good.safetensors", "cache_dir": "/"}], errors.InvalidRequest, "only the"),
        ({"scale": 1}, errors.InvalidRequest, "name"),
        (7, errors.InvalidRequest, "lora_weights"),
        ("", errors.InvalidRequest, "lora_weights"),
        ("x" * 2000, errors.InvalidRequest, "lora_weights"),
        ("good\0.safetensors", errors.InvalidRequest, "lora_weights"),
        ({"name": "good", "weight_name": "\udc80.safetensors"}, errors.InvalidRequest, "lora"),
        ("/etc/passwd", errors.UntrustedSource, "allowed"),
        ("../good.safetensors", errors.UntrustedSource, "allowed"),
        ("owner/repository", errors.UntrustedSource, "allowed"),
        ("https://example.com/x.safetensors", errors.UntrustedSource, "allowed"),
        ("good.ckpt", errors.UntrustedSource, "allowed"),
        ("god.safetensors", errors.AdapterNotFound, "did you mean 'good.safetensors'"),
    ],
)
def test_bad_names_are_refused_by_their_field(pipeline, folder, asked, error, match):
    bank = bank_of(pipeline, folder)
    with pytest.raises(error, match=match) as caught:
        bank.find(asked)
    assert caught.value.error_code == (404 if error is errors.AdapterNotFound else 400)


def test_an_unknown_name_is_compared_with_few_of_very_many():
    known = [f"{kind}-{index:04d}.safetensors" for kind in ("a", "style") for index in range(3000)]
    near = _near("style-012.safetensors", known)
    assert len(near) == 200
    assert all(name.startswith("sty") for name in near)
    assert len(_near("zzz.safetensors", known)) == 200
    assert _near("zzz", known[:3]) == known[:3]


def test_links_that_lead_out_are_refused(pipeline, folder, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(folder / "good.safetensors")
    with pytest.raises(errors.UntrustedSource):
        bank_of(pipeline, tmp_path).find("link.safetensors")


def test_a_loop_of_links_is_no_file(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(errors.AdapterNotFound, match="known: none"):
        AdapterFinder("lora", ("lora_dir",), tmp_path).find_all("loop.safetensors")


@pytest.mark.parametrize("name", ["a b", "\u062e\u0637\u200c\u0646", "\U0001f469\u200d\U0001f3a8"])
def test_files_are_found_by_names_in_any_script(pipeline, folder, tmp_path, name):
    shutil.copy(folder / "good.safetensors", tmp_path / f"{name}.safetensors")
    assert prepare(bank_of(pipeline, tmp_path), f"{name}.safetensors").loras


def test_arguments_are_never_changed(pipeline, folder):
    asked = [{"model_name": "good.safetensors", "scale": 0.5}, "good.safetensors"]
    bank_of(pipeline, folder).find(asked)
    assert asked == [{"model_name": "good.safetensors", "scale": 0.5}, "good.safetensors"]


def test_the_adapters_of_the_demo_model_by_their_tags():
    from diffusers import StableDiffusionPipeline

    bentoml_diffusers.import_demo_models()
    call = {"height": 64, "width": 64, "num_inference_steps": 4}

    def make():
        return StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)

    pipeline = make()
    bank = AdapterBank(pipeline, ModelOptions())
    plain = generate(pipeline, **call)
    asked = [{"name": "outline", "scale": 0.8}, {"name": "stripes:latest", "scale": 0.5}]
    ours = generate_alone(pipeline, bank, asked, **call)
    theirs = generate_by_peft(make, [(LORAS["outline"], 0.8), (LORAS["stripes"], 0.5)], **call)
    # float32: scales multiply in another order than in PEFT.
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 0.05
    assert torch.equal(generate(pipeline, **call), plain)
    report = bank.report()
    assert {"outline", "stripes"} <= set(report.known)
    assert "teal" in report.known_inversions
    assert "teal" not in report.known
    assert report.in_slots == ("outline", "stripes:latest")
    assert (report.misses, report.hits) == (2, 0)
    assert 0 < report.load_s < 60
    prepare(bank, "outline")
    assert bank.report().hits == 1
    bank.close()


def test_a_file_that_changed_is_read_again(pipeline, tmp_path):
    path = tmp_path / "x.safetensors"
    bank = bank_of(pipeline, tmp_path)
    images = []
    for seed in (1, 2):
        save_lora(path, testing.tiny_stable_diffusion, {"unet": ["to_q"]}, seed=seed, strength=seed)
        images.append(generate_alone(pipeline, bank, path.name))
    assert not torch.equal(*images)
    assert (
        images[1] - generate_by_peft(testing.tiny_stable_diffusion, [(path, 1.0)])
    ).abs().max() < 5e-6
    bank.close()


def copy_with_times(source, target):
    shutil.copy2(source, target)


def move_with_times(source, target):
    shutil.copy2(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


@pytest.mark.parametrize("replace", [copy_with_times, move_with_times], ids=["cp -p", "rsync -t"])
def test_a_file_of_the_same_size_and_time_is_read_again(pipeline, tmp_path, replace):
    """Also its hash, which workflows record; and its name is in the report once."""
    versions = [tmp_path / "1", tmp_path / "2"]
    for seed, path in enumerate(versions, 1):
        save_lora(path, testing.tiny_stable_diffusion, {"unet": ["to_q"]}, seed=seed, strength=1)
        os.utime(path, (1, 1))
    path = tmp_path / "x.safetensors"
    replace(versions[0], path)
    bank = bank_of(pipeline, tmp_path)
    running = bank.acquire(prepare(bank, path.name))
    before, digest = (
        generate_alone(pipeline, bank, path.name),
        hash_adapter(bank.find(path.name).loras[0]),
    )
    size = path.stat().st_size
    replace(versions[1], path)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 1)
    after = generate_alone(pipeline, bank, path.name)
    assert not torch.equal(before, after)
    assert hash_adapter(bank.find(path.name).loras[0]) != digest
    report = bank.report()
    assert (report.in_memory, report.in_slots) == ((path.name,), (path.name,))
    running.release()
    replace(versions[0], path)
    generate_alone(pipeline, bank, path.name)
    assert bank.report().in_slots == (path.name,)
    assert len(bank._pool._free) == bank._pool.slots - 1
    bank.close()


class Block:
    def __init__(self, name, n_bytes):
        self.name, self.n_bytes = name, n_bytes


def test_the_host_cache_is_bounded_in_bytes():
    cache = HostCache(100)
    for name in "abc":
        cache.get(name, lambda name=name: Block(name, 40))
    assert (cache.names(), cache.n_bytes) == (["b", "c"], 80)
    cache.get("b", lambda: pytest.fail("it is there"))
    cache.get("d", lambda: Block("d", 40))
    assert cache.names() == ["b", "d"]
    assert cache.get("e", lambda: Block("e", 101)).name == "e"
    assert cache.names() == ["b", "d"]
    assert (cache.counts.hits, cache.counts.misses) == (1, 5)


def test_two_threads_read_a_file_once_and_errors_are_not_kept():
    cache, calls = HostCache(100), []

    def load():
        calls.append(1)
        time.sleep(0.05)
        return Block("x", 1)

    threads = [threading.Thread(target=cache.get, args=("x", load)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("y", lambda: 1 // 0)
    assert not cache._loading


def test_preparing_in_many_threads(pipeline, folder):
    bank = bank_of(pipeline, folder, lora_cache_bytes=0)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(bank, "good.safetensors")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert bank.report().in_memory == ()


def installed_classes():
    """Pipeline classes of diffusers whose packages are installed."""
    for name in dir(diffusers):
        try:
            cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        except RuntimeError:
            continue
        if isinstance(cls, type) and "_backends" not in vars(cls):
            yield cls


def test_every_class_that_diffusers_gives_lora_takes_it():
    with_lora = [cls for cls in installed_classes() if hasattr(cls, "load_lora_weights")]
    assert len(with_lora) > 100
    assert all(supports_lora(cls) for cls in with_lora)


def loaders():
    """One class for each implementation of `load_lora_weights`."""
    found = {}
    for cls in installed_classes():
        if hasattr(cls, "load_lora_weights"):
            found.setdefault(cls.load_lora_weights, cls)
    return sorted(found.values(), key=lambda cls: cls.__name__)


class Base(torch.nn.Module):
    """Any denoiser: one layer, in the place of a block's attention."""

    config = type("Config", (), {"in_channels": 8, "image_dim": None})()

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].to_q = torch.nn.Linear(8, 6)


class Layers:
    def __init__(self, modules):
        self._modules = {name: dict(part.named_modules()) for name, part in modules.items()}

    def module(self, component, path):
        return self._modules[component].get(path)


@pytest.mark.parametrize("cls", loaders(), ids=lambda cls: cls.__name__)
def test_the_recorder_suits_each_loader_of_diffusers(cls, tmp_path):
    components = {name: Base() for name in (*cls._lora_loadable_modules, "text_encoder_2")}
    # A bare instance of a subclass whose `components` need no config.
    bare = object.__new__(type(cls.__name__, (cls,), {"components": components}))
    bare.__dict__.update(components)
    component = next(name for name in cls._lora_loadable_modules if "text_encoder" not in name)
    tensors = {
        f"{component}.blocks.0.to_q.lora_A.weight": torch.randn(2, 8),
        f"{component}.blocks.0.to_q.lora_B.weight": torch.randn(6, 2),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    raw = convert_lora(bare, Layers(components), "x", path)
    found = raw.layers[component]["blocks.0.to_q"]
    assert torch.equal(found.down, tensors[f"{component}.blocks.0.to_q.lora_A.weight"])
    assert torch.equal(found.up, tensors[f"{component}.blocks.0.to_q.lora_B.weight"])
    assert found.factor == 1.0


@pytest.mark.parametrize("cls", [diffusers.ZImagePipeline, diffusers.Flux2Pipeline])
def test_lokr_that_diffusers_reads_itself_is_left_to_it(cls, tmp_path):
    components = {"transformer": Base()}
    bare = object.__new__(type(cls.__name__, (cls,), {"components": components}))
    bare.__dict__.update(components)
    if not reads_lokr(bare):
        pytest.skip(f"diffusers {diffusers.__version__} reads none for {cls.__name__}")
    key = "transformer.blocks.0.to_q"
    if cls is diffusers.ZImagePipeline:  # ai-toolkit
        key = key.replace("transformer", "diffusion_model")
    path, ends = tmp_path / "x.safetensors", {"lokr_w1": (2, 2), "lokr_w2": (3, 4)}
    tensors = {f"{key}.{end}": torch.randn(shape) for end, shape in ends.items()}
    save_file({**tensors, f"{key}.alpha": torch.tensor(4.0)}, path)
    raw = convert_lora(bare, Layers(components), "x", path)
    assert (raw.beyond_slots, raw.left_out) == ("LoKr", None)
    lost = {name.replace("blocks.0", "blocks.7"): tensor for name, tensor in tensors.items()}
    save_file(lost, path)
    with pytest.raises(errors.InvalidModel, match=r"no layer .*blocks\.7"):
        convert_lora(bare, Layers(components), "x", path)


def test_what_is_recorded_changes_nothing():
    module = Base()
    recorder = Recorder("unet", module, RawLora())
    recorder.to("meta")
    assert module.blocks[0].to_q.weight.device.type == "cpu"


def test_lycoris_files_for_sdxl_name_layers_as_stability_does():
    """Compared with diffusers' own conversion of checkpoints, by a number in each layer."""
    pipeline = testing.tiny_stable_diffusion_xl()
    unet = pipeline.unet
    layers = {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    names = {path: original_name(path, unet.config.layers_per_block) for path in layers}
    numbers = {path: torch.full((1,), float(number)) for number, path in enumerate(layers)}
    checkpoint = {
        f"model.diffusion_model.{names[path]}.{part}": number
        for path, number in numbers.items()
        for part in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {key.rpartition(".")[0]: value for key, value in converted.items()} == numbers
    file = {
        f"lora_unet_{names[path].replace('.', '_')}.{part}": torch.ones(shape)
        for path, module in layers.items()
        for part, shape in (
            ("lokr_w1", (1, 1)),
            ("lokr_w2", (module.weight.shape[0], module.weight[0].numel())),
        )
    }
    found = read_lycoris(pipeline, "style.safetensors", file)
    assert [layer.path for layer in found] == list(layers)
