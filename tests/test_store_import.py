"""Imports from a folder: by links, whole or not at all, and only what is whole."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bentoml
import numpy as np
import pytest
from safetensors.numpy import save_file

import bentoml_diffusers
from bentoml_diffusers import errors, store
from bentoml_diffusers.store.entries import hashing, linking
from bentoml_diffusers.store.sources import source


@pytest.fixture
def light_folder(tmp_path):
    """A folder that imports as a pipeline, without real weights: no torch is needed for it."""
    return make_light_folder(tmp_path / "light")


def make_light_folder(folder, floats=40_000):
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    weights = {"w": np.arange(floats, dtype=np.float32)}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def stored_file(model, name="unet/diffusion_pytorch_model.safetensors"):
    return Path(model.path, "diffusion_model", name)


def weights_of(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_small_files_are_copied_and_large_ones_linked_once(light_folder, name):
    model = bentoml_diffusers.import_model(name, light_folder, link="hard")
    assert stored_file(model).samefile(weights_of(light_folder)) or not can_link(light_folder)
    assert not stored_file(model, "unet/config.json").samefile(light_folder / "unet/config.json")


def can_link(folder):
    return folder.stat().st_dev == Path(os.environ["BENTOML_HOME"]).stat().st_dev


@pytest.mark.parametrize("link", ["auto", "copy"])
def test_later_edits_in_place_do_not_reach_the_store(light_folder, name, link):
    """Also for root, whom no permission stops: there `auto` copies."""
    model = bentoml_diffusers.import_model(name, light_folder, link=link)
    edited = [path for path in sorted(light_folder.rglob("*.*")) if edit_in_place(path)]
    assert len(edited) >= 3
    assert store.verify(model).is_intact


def edit_in_place(path):
    """False if the file is protected, as a linked one is."""
    try:
        with path.open("r+b") as stream:
            stream.write(b"E")
    except PermissionError:
        assert path.stat().st_size >= linking.SMALL_BYTES
        return False
    return True


@pytest.fixture
def public_folder():
    """A folder that other users reach, too: not all can be entered by them, nor pytest's own."""
    for place in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if all(path.stat().st_mode & stat.S_IXOTH for path in (place, *place.parents)):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                Path(folder).chmod(0o755)
                yield Path(folder)
            return
    pytest.skip("no temporary folder can be entered by another user")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the rights of another user")
def test_an_ordinary_user_links_and_cannot_edit_in_place(public_folder):
    """Linked, made read-only, and the store stays whole."""
    folder = make_light_folder(public_folder / "light")
    code = f"""
import os, pathlib, bentoml_diffusers
from bentoml_diffusers import store
folder, public = pathlib.Path({str(folder)!r}), pathlib.Path({str(public_folder)!r})
store.verify(bentoml_diffusers.import_model("warm", folder))  # Python itself may be root's
for path in (public, *public.rglob("*")):
    os.chown(path, 65534, 65534)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
model = bentoml_diffusers.import_model("light", folder)
inside = pathlib.Path(model.path, "diffusion_model", *weights.parts[-2:])
print(inside.samefile(weights), weights.stat().st_mode & 0o222)
try:
    weights.open("r+b")
except PermissionError:
    print("refused", store.verify(model).is_intact)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "BENTOML_HOME": str(public_folder / "home"),
            "TMPDIR": str(public_folder),  # the tests' own may be closed to that user
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout.split() == ["True", "0", "refused", "True"], done.stderr


def test_a_clone_is_a_file_of_its_own_or_nothing(light_folder, tmp_path):
    """Whether the file system of this machine can do it or not."""
    source = weights_of(light_folder)
    done = linking.clone_file(source, tmp_path / "clone")
    assert (tmp_path / "clone").exists() == done
    assert not done or (tmp_path / "clone").read_bytes() == source.read_bytes()
    assert not done or not (tmp_path / "clone").samefile(source)


def test_where_files_can_be_cloned_nothing_is_linked(light_folder, name, monkeypatch):
    """Simulated: a clone holds the same and has an inode of its own."""
    monkeypatch.setattr(
        linking, "clone_file", lambda source, target: bool(shutil.copyfile(source, target))
    )
    before = weights_of(light_folder).stat().st_mode
    model = bentoml_diffusers.import_model(name, light_folder)
    assert not stored_file(model).samefile(weights_of(light_folder))
    assert weights_of(light_folder).stat().st_mode == before
    assert store.read_record(Path(model.path)).stamps == {}
    assert edit_in_place(weights_of(light_folder))
    assert store.verify(model).is_intact


def test_an_edit_of_a_linked_file_is_noticed(light_folder, name):
    """`link="hard"` trusts the caller; a file that is edited all the same is refused."""
    model = bentoml_diffusers.import_model(name, light_folder, link="hard")
    with weights_of(light_folder).open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"EDIT")
    with pytest.raises(errors.InvalidModel, match="changed in place"):
        bentoml_diffusers.load_model(model)
    assert store.verify(model).changed == ("unet/diffusion_pytorch_model.safetensors",)


def test_a_linked_file_with_another_date_is_the_same(light_folder, name):
    model = bentoml_diffusers.import_model(name, light_folder, link="hard")
    record = store.read_record(Path(model.path))
    assert list(record.stamps) == ["unet/diffusion_pytorch_model.safetensors"]
    os.utime(weights_of(light_folder), (1, 1))
    root = Path(model.path, "diffusion_model")
    hashing.check_stamps(name, root, record.stamps, record.files)
    with pytest.raises(errors.InvalidModel, match="changed in place"):
        hashing.check_stamps(name, root, record.stamps, {})


def test_files_are_never_linked_twice_into_one_model(light_folder, name, tmp_path):
    """Two links to one inode would be a link inside the exported archive, which BentoML refuses."""
    twin = light_folder / "unet" / "twin.txt"
    os.link(weights_of(light_folder), twin)
    model = bentoml_diffusers.import_model(name, light_folder, link="hard")
    assert not stored_file(model, "unet/twin.txt").samefile(stored_file(model))
    archive = bentoml.models.export_model(str(model.tag), str(tmp_path / "x.bentomodel"))
    bentoml.models.delete(str(model.tag))
    again = bentoml.models.import_model(archive)
    assert store.verify(again).is_intact


def test_permissions_come_back_when_an_import_fails(light_folder, name, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)  # as for an ordinary user
    before = weights_of(light_folder).stat().st_mode
    monkeypatch.setattr(
        "bentoml_diffusers.store.filling.finish_record",
        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(errors.StorageFull, match="no space left"):
        bentoml_diffusers.import_model(name, light_folder)
    assert weights_of(light_folder).stat().st_mode == before
    assert_not_stored(name)


def test_a_full_disk_leaves_the_store_as_it_was(light_folder, name, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(errors.StorageFull, match="BENTOML_HOME") as caught:
        bentoml_diffusers.import_model(name, light_folder)
    assert caught.value.error_code == 507
    assert_not_stored(name)


def test_a_full_disk_while_weights_are_written(name, monkeypatch):
    """safetensors says it in its own way."""
    from diffusers import DDPMPipeline
    from safetensors import SafetensorError

    from bentoml_diffusers import testing

    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", fail)
    with pytest.raises(errors.StorageFull):
        bentoml_diffusers.save_model(name, testing.tiny_ddpm())
    assert_not_stored(name)


def assert_not_stored(name):
    home = Path(os.environ["BENTOML_HOME"])
    assert not (home / "models" / name).exists()
    staging = home / "diffusers_staging"
    assert not [path for path in staging.iterdir() if path.is_dir()]


def test_hashes_of_large_files_follow(light_folder, name, monkeypatch):
    monkeypatch.setattr(hashing, "EAGER_BYTES", 1000)
    (light_folder / "unet" / "large.txt").write_bytes(b"x" * (2 << 20))
    started = []
    monkeypatch.setattr(hashing.threading.Thread, "start", lambda thread: started.append(thread))
    model = bentoml_diffusers.import_model(name, light_folder)
    record = store.read_record(Path(model.path))
    assert (record.tree, "unet/large.txt" in record.files) == (None, False)
    assert len(started) == 1
    hashing._threads.clear()  # as if the process had been killed before it ran
    tree = store.hash_of_model(model)
    record = store.read_record(Path(model.path))
    assert record.tree == tree == hashing.hash_tree(record.files)
    assert record.files["unet/large.txt"] == hashing.hash_file(light_folder / "unet/large.txt")


def test_a_thread_completes_the_record(light_folder, name, monkeypatch):
    monkeypatch.setattr(hashing, "EAGER_BYTES", 1000)
    (light_folder / "unet" / "large.txt").write_bytes(b"x" * (2 << 20))
    model = bentoml_diffusers.import_model(name, light_folder)
    deadline = time.monotonic() + 20
    while store.read_record(Path(model.path)).tree is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.verify(model).is_intact
    again = bentoml_diffusers.import_model(name, light_folder)
    assert again.tag == model.tag


@pytest.mark.parametrize("what", ["changed", "missing", "added"])
def test_verify_names_what_differs(light_folder, name, what):
    model = bentoml_diffusers.import_model(name, light_folder, link="copy")
    path = stored_file(model, "scheduler/scheduler_config.json")
    if what == "changed":
        path.write_text("[]")
    elif what == "missing":
        path.unlink()
    else:
        path = path.with_name("more.json")
        path.write_text("{}")
    check = store.verify(model)
    assert getattr(check, what) == (f"scheduler/{path.name}",)
    assert not check.is_intact


def test_an_unchanged_model_is_intact(light_folder, name):
    model = bentoml_diffusers.import_model(name, light_folder)
    check = store.verify(model)
    assert (check.is_intact, check.files) == (True, 4)


def test_the_same_thing_is_stored_once_and_another_is_not_taken_for_it(light_folder, name):
    first = bentoml_diffusers.import_model(name, light_folder)
    assert bentoml_diffusers.import_model(name, light_folder).tag == first.tag
    assert bentoml_diffusers.import_model(first.tag, light_folder).tag == first.tag
    more = bentoml_diffusers.import_model(name, light_folder, signatures={"__call__": {}, "b": {}})
    assert more.tag != first.tag
    (light_folder / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(errors.TagConflict, match="new version"):
        bentoml_diffusers.import_model(first.tag, light_folder)
    with pytest.raises(errors.TagConflict):
        bentoml_diffusers.import_model(first.tag, light_folder, options={"offload": "model"})


def test_a_version_is_not_taken_for_one_that_starts_like_it(light_folder, name):
    bentoml_diffusers.import_model(f"{name}:v10", light_folder)
    model = bentoml_diffusers.import_model(f"{name}:v1", light_folder)
    assert model.tag.version == "v1"


def break_safetensors(folder):
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def break_header(folder):
    data = bytearray(weights_of(folder).read_bytes())
    data[8:12] = b"\0\0\0\0"
    weights_of(folder).write_bytes(bytes(data))


def change_index(**changes):
    def change(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def link_out(folder):
    shutil.copy(weights_of(folder), folder.parent / "outside")
    weights_of(folder).unlink()
    weights_of(folder).symlink_to(folder.parent / "outside")


def link_folder_out(folder):
    shutil.move(folder / "unet", folder.parent / "unet")
    (folder / "unet").symlink_to(folder.parent / "unet")


def shard(name):
    def change(folder):
        index = {"weight_map": {"w": name}}
        path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_safetensors, "truncated"),
        (break_header, "broken"),
        (change_index(vae=["diffusers", "AutoencoderKL"]), "vae"),
        (change_index(**{"../vae": ["diffusers", "AutoencoderKL"]}), r"\.\./vae"),
        (change_index(_class_name=["code", "Pipeline"]), r"code\.py"),
        (change_index(_class_name=["../code", "Pipeline"]), r"code\.py"),
        (link_out, "points outside"),
        (link_folder_out, "link to a folder"),
        (shard("../../secret.safetensors"), "outside"),
        (shard("missing.safetensors"), "lacks unet/missing"),
        (lambda folder: weights_of(folder).unlink(), "no weights for 'unet'"),
    ],
)
def test_a_bad_folder_is_refused_and_nothing_is_stored(light_folder, name, damage, words):
    damage(light_folder)
    with pytest.raises(errors.InvalidModel, match=words):
        bentoml_diffusers.import_model(name, light_folder)
    assert_not_stored(name)


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(light_folder, name):
    weights = weights_of(light_folder)
    digest = hashing.hash_file(weights)
    cache = light_folder.parent / "models--us--light"
    (cache / "blobs").mkdir(parents=True)
    weights.rename(cache / "blobs" / digest)
    snapshot = cache / "snapshots" / "abc"
    shutil.copytree(light_folder, snapshot)
    weights_of(snapshot).symlink_to(cache / "blobs" / digest)
    (snapshot / "unet" / "extra.txt").symlink_to("config.json")
    model = bentoml_diffusers.import_model(name, snapshot)
    assert stored_file(model).samefile(cache / "blobs" / digest)
    assert not stored_file(model).is_symlink()
    assert store.verify(model).is_intact
    assert stored_file(model, "unet/extra.txt").read_text().startswith("{")


def test_a_snapshots_own_name_opens_no_other_folder(tmp_path):
    assert source.hub_blobs(tmp_path) is None


def add_weights(folder, *names):
    for name in names:
        shutil.copy(weights_of(folder), folder / name)


def test_one_variant_and_one_format_are_taken(light_folder, name):
    add_weights(
        light_folder,
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
    )
    plain = bentoml_diffusers.import_model(name, light_folder)
    half = bentoml_diffusers.import_model(name, light_folder, variant="fp16")
    files = {
        model.tag.version: sorted(
            path.name for path in Path(model.path, "diffusion_model", "unet").iterdir()
        )
        for model in (plain, half)
    }
    assert files[plain.tag.version] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert files[half.tag.version] == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert len(list(Path(plain.path, "diffusion_model").iterdir())) == 3
    with pytest.raises(errors.InvalidModel, match="no variant 'fp8', it has fp16, non_ema"):
        bentoml_diffusers.import_model(name, light_folder, variant="fp8")


def test_a_folder_with_only_variants_asks_which(light_folder, name):
    weights = weights_of(light_folder)
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(errors.InvalidModel, match="only in the variants fp16"):
        bentoml_diffusers.import_model(name, light_folder)


def test_sharded_variants_are_recognised():
    from bentoml_diffusers.store.sources import WeightChoice, select_files

    index = {"_class_name": "X", "t": ["diffusers", "FluxTransformer2DModel"]}
    names = [
        "t/config.json",
        "t/diffusion_pytorch_model-00001-of-00002.safetensors",
        "t/diffusion_pytorch_model-00002-of-00002.safetensors",
        "t/diffusion_pytorch_model.safetensors.index.json",
        "t/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "t/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "t/diffusion_pytorch_model.safetensors.index.fp16.json",
        "t/pytorch_model.bin.index.json",
        "t/pytorch_model-00001-of-00002.bin",
    ]
    plain = select_files(index, names, source="x")
    assert set(plain.files) == {"model_index.json", *names[:4]}
    half = select_files(index, names, source="x", weights=WeightChoice(variant="fp16"))
    assert set(half.files) == {"model_index.json", names[0], *names[4:7]}


def test_two_imports_of_one_tag_at_once_give_one_model(light_folder, name):
    """Both wait for the same moment; each gets the one model, with and without a version."""
    code = (
        "import sys, time, bentoml_diffusers\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"for tag in ('{name}:v1', '{name}-b'):\n"
        f"    print(bentoml_diffusers.import_model(tag, {str(light_folder)!r}).tag, flush=True)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60)[0] for process in both}
    assert len(said) == 1
    assert said.pop().startswith(f"{name}:v1\n{name}-b:")
    assert len(bentoml.models.list(name)) == len(bentoml.models.list(f"{name}-b")) == 1


def test_another_thing_at_the_same_moment_is_a_conflict(light_folder, tmp_path, name, monkeypatch):
    other = make_light_folder(tmp_path / "other", floats=30_000)
    from bentoml_diffusers.store import importing

    fill = importing.fill_from_folder

    def fill_while_another_comes(entry, record, found, code, linker):
        if found.folder == light_folder:
            bentoml_diffusers.import_model(f"{name}:v1", other)
        return fill(entry, record, found, code, linker)

    monkeypatch.setattr(importing, "fill_from_folder", fill_while_another_comes)
    with pytest.raises(errors.TagConflict, match="folder other"):
        bentoml_diffusers.import_model(f"{name}:v1", light_folder)
    assert len(bentoml.models.list(name)) == 1


KILLS = 30

WORKER = """
import os, sys, bentoml_diffusers
from bentoml_diffusers.store import import_model
folder = sys.argv[1]
print("warm", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        import_model(line.strip(), folder, link=sys.argv[2])
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_a_killed_import_leaves_the_whole_model_or_none(light_folder, name, tmp_path):
    """30 kills at random points; a process that is warm already forks one for each import."""
    for number in range(20):
        (light_folder / "unet" / f"part{number}.txt").write_bytes(b"x" * 200_000)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(light_folder), "copy"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "BENTOML_HOME": str(tmp_path / "home")},
    )
    try:
        assert worker.stdout.readline() == "warm\n"
        full_s = max(import_in(worker, f"{name}:whole{number}") for number in range(2))
        outcomes = [
            kill_at(worker, f"{name}:v{number}", random.uniform(0, 1.1 * full_s))
            for number in range(KILLS)
        ]
    finally:
        worker.stdin.close()
        worker.wait()
        worker.stdout.close()
    assert_whole_or_none(tmp_path / "home", name, light_folder)
    assert 0 < sum(outcomes) <= KILLS, "no kill came in time"


def import_in(worker, tag):
    started = time.monotonic()
    kill_at(worker, tag, None)
    return time.monotonic() - started


def kill_at(worker, tag, after_s):
    """Returns True if the import was killed before it was done."""
    worker.stdin.write(f"{tag}\n")
    worker.stdin.flush()
    pid = int(worker.stdout.readline())
    killed = False
    if after_s is not None:
        time.sleep(after_s)
        try:
            os.kill(pid, signal.SIGKILL)
            killed = True
        except ProcessLookupError:
            pass
    assert worker.stdout.readline() == "gone\n"
    return killed


def assert_whole_or_none(home, name, folder):
    """In a process of its own, as the store's place is set once."""
    code = (
        "import bentoml, bentoml_diffusers\n"
        "from bentoml_diffusers import store\n"
        f"for model in bentoml.models.list({name!r}):\n"
        "    assert store.verify(model).is_intact, model\n"
        f"model = bentoml_diffusers.get({name!r})\n"
        f"again = bentoml_diffusers.import_model('{name}:after', {str(folder)!r})\n"
        "staging = __import__('pathlib').Path(model.path).parents[2] / 'diffusers_staging'\n"
        "print('left', [p for p in staging.iterdir() if p.is_dir()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "left []"
