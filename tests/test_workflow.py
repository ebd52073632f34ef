"""Workflows as records: all values come back, files of every version load, bad ones are refused."""

import base64
import dataclasses
import enum
import hashlib
import inspect
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import diffusers
import hub
import numpy as np
import pytest
import torch
from PIL import Image

from bentoml_diffusers import errors
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.workflow import Workflow
from bentoml_diffusers.workflow.files import (
    FORMAT,
    Bounds,
    Output,
    OutputPart,
    Pipeline,
    bundles,
    summarize,
)
from bentoml_diffusers.workflow.record import Decoder, capture, complete_arguments
from bentoml_diffusers.workflow.replay import check_limits, check_method

FORMATS = Path(__file__).parent / "formats" / "workflows"
IMAGE = Image.effect_noise((24, 16), 90)


def make(**arguments):
    return capture(arguments).to_workflow(pipeline=Pipeline(class_name="AnyPipeline"))


def decode(workflow, **more):
    return Decoder(workflow.blobs, workflow.generators, **more).decode_all(workflow.arguments)


def travel(workflow):
    return Workflow.from_json(workflow.to_json())


def is_same(one, other):
    if isinstance(other, enum.Enum):
        return one == other
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Image.Image):
        return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    return one == other or (one != one and other != other)


def list_classes():
    found = {
        name: getattr(diffusers, name)
        for name in dir(diffusers)
        if name.endswith("Pipeline") and isinstance(getattr(diffusers, name), type)
    }
    return [
        cls
        for name, cls in sorted(found.items())
        if issubclass(cls, diffusers.DiffusionPipeline)
        and any("__call__" in vars(base) for base in cls.__mro__[:-1])
        and not issubclass(cls, diffusers.ModularPipeline)
    ]


def example_of(name):
    """A value for an argument without a default."""
    if "image" in name or "mask" in name:
        return IMAGE
    return torch.arange(4.0) if "embed" in name or "latent" in name else "text"


def test_there_are_as_many_pipeline_classes_as_the_docs_say():
    assert len(list_classes()) > 250


@pytest.mark.parametrize("cls", list_classes(), ids=lambda cls: cls.__name__)
def test_arguments_of_every_class_come_back(cls):
    pipeline = cls.__new__(cls)
    items = list(inspect.signature(cls.__call__).parameters.values())[1:]
    given = {
        item.name: example_of(item.name)
        for item in items
        if item.default is item.empty and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    }
    named = {item.name for item in items}
    if "generator" in named:
        given["generator"] = torch.Generator().manual_seed(5)
    if any(item.kind is item.VAR_KEYWORD for item in items):
        given["one_more"] = (1, "x")
    bound = complete_arguments(pipeline, "__call__", (), given)
    assert given.keys() <= bound.keys()
    assert named - bound.keys() <= {"args", "kwargs"}
    workflow = make(**bound)
    assert not workflow.unsupported
    assert is_same(decode(travel(workflow)), bound)


@pytest.mark.parametrize(("args", "more"), [(("state",), {}), ((), {"state": "state"})])
def test_a_modular_pipeline_takes_no_state(args, more):
    pipeline = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    with pytest.raises(errors.InvalidRequest, match="by name") as caught:
        complete_arguments(pipeline, "__call__", args, {"prompt": "a cat", **more})
    assert caught.value.field == "state"


def test_inputs_of_modular_pipelines_come_back():
    names = [name for name in dir(diffusers) if name.endswith("ModularPipeline")]
    assert len(names) > 15
    for name in names:
        cls = getattr(diffusers, name)
        if cls.default_blocks_name is None:
            continue
        bound = complete_arguments(cls(), "__call__", (), {"prompt": "text"})
        workflow = make(**bound)
        assert not workflow.unsupported, name
        assert is_same(decode(travel(workflow)), bound), name


def used_generator():
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    return generator


VALUES = {
    "text": "ä \u2028 😀",
    "numbers": [0, -1, 2**40, 0.1, 1e-300, True, None],
    "odd floats": [float("inf"), float("-inf"), float("nan")],
    "tuple": ((1, 2), ()),
    "dict": {"scale": 0.5, "deep": {"list": [1]}},
    "dict of numbers": {1: "a", (2, 3): "b"},
    "dict like ours": {"$kind": "image", "blob": "x"},
    "tensors": [torch.randn(2, 3), torch.tensor(1.5), torch.zeros(0, 2), torch.ones(2).bool()],
    "bfloat16": torch.randn(3).to(torch.bfloat16),
    "strided": torch.randn(4, 4).t()[1:],
    "arrays": [np.arange(6).reshape(2, 3), np.float32([0.5]), np.asarray(2.0), np.ones(3)[::-1]],
    "generators": [used_generator(), torch.Generator().manual_seed(-1)],
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "bytes": b"\0\xff",
    **{
        f"image {mode}": IMAGE.convert("RGB").convert(mode)
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F", "I")
    },
    "image I;16": Image.frombytes("I;16", (4, 4), bytes(range(32))),
    "images": [IMAGE, IMAGE.convert("RGB")],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back(name):
    workflow = make(value=VALUES[name])
    assert not workflow.unsupported
    assert is_same(decode(travel(workflow))["value"], VALUES[name])


def test_numbers_of_numpy_are_numbers():
    assert make(value=np.float64(0.5), steps=np.int64(3)).arguments == {"value": 0.5, "steps": 3}


def test_one_generator_in_two_places_stays_one():
    generator = torch.Generator().manual_seed(1)
    first, second = decode(travel(make(generator=[generator, generator])))["generator"]
    assert first is second


def test_equal_images_are_one_blob():
    workflow = make(image=IMAGE, again=[IMAGE.copy()])
    assert len(workflow.blobs) == 1


def test_metadata_of_a_image_stays_outside():
    image = IMAGE.convert("RGB")
    image.info = {"comment": "secret", "icc_profile": b"secret"}
    (blob,) = make(image=image).blobs.values()
    assert b"secret" not in blob
    assert image.info["comment"] == "secret"


def a_callback(*args):
    return {}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (a_callback, "function a_callback"),
        ([a_callback], "function a_callback"),
        (object(), "object"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (np.array([object()]), "object"),
        (inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY), "Parameter"),
    ],
)
def test_what_cannot_be_kept_is_named(value, name):
    workflow = make(prompt="a", odd=value)
    assert workflow.arguments == {"prompt": "a"}
    assert name in workflow.unsupported["odd"]


@pytest.fixture
def workflow():
    return make(prompt="a cat", image=IMAGE, latents=torch.randn(1, 4))


def test_it_pickles(workflow):
    copied = pickle.loads(pickle.dumps(workflow))
    assert copied == workflow
    assert copied.blobs == workflow.blobs


@pytest.mark.parametrize("filename", ["diffusion_workflow.json", "other.json", "all.zip"])
def test_files_come_back(workflow, tmp_path, filename):
    path = workflow.save_workflow(tmp_path / "new", filename)
    beside = {file.name for file in (tmp_path / "new").iterdir()} - {filename}
    assert beside == (set() if filename.endswith(".zip") else {"blobs"})
    for source in (path, str(path)):
        assert Workflow.load(source) == workflow
    assert Workflow.load(tmp_path / "new", filename=filename).blobs == workflow.blobs
    if filename.endswith(".zip"):
        assert Workflow.from_bytes(path.read_bytes(), RequestLimits()) == workflow


def test_equal_workflows_are_equal_files(workflow, tmp_path):
    first = workflow.save_workflow(tmp_path, "a.zip").read_bytes()
    assert travel(workflow).save_workflow(tmp_path, "b.zip").read_bytes() == first


@pytest.mark.parametrize("path", sorted(FORMATS.glob("*.json")), ids=lambda path: path.stem)
def test_files_of_every_version_load(path):
    workflow = Workflow.load(path)
    assert workflow.version == 1
    arguments = decode(workflow)
    assert arguments["prompt"] == "a red circle"
    assert arguments["image"].size == (8, 8)
    assert workflow.adapters[0].scale == 0.5
    assert workflow.generators[0].seed == 7


def values_of(workflow):
    return json.loads(workflow.to_json())


def refused(values, match, field=None, limits=None):
    data = values if isinstance(values, (str, bytes)) else json.dumps(values)
    with pytest.raises(errors.InvalidWorkflow, match=match) as caught:
        Workflow.from_bytes(data if isinstance(data, bytes) else data.encode(), limits)
    assert int(caught.value.error_code) == 400
    if field is not None:
        assert caught.value.field == field


def test_a_newer_version_says_upgrade(workflow):
    values = values_of(workflow) | {"version": 2, "new": 1}
    refused(values, "upgrade bentoml-diffusers", "workflow.version")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": "other"}, "workflow.format"),
        ({"version": "1"}, "workflow.version"),
        ({"version": 0}, "workflow.version"),
        ({"more": 1}, "workflow.more"),
        ({"seeds": [-1]}, "workflow.seeds.0"),
        ({"seeds": [2**32]}, "workflow.seeds.0"),
        ({"seeds": ["1"]}, "workflow.seeds.0"),
        ({"arguments": []}, "workflow.arguments"),
        ({"pipeline": {}}, "workflow.pipeline.class_name"),
        ({"pipeline": {"class_name": "X", "path": "/"}}, "workflow.pipeline.path"),
        ({"exclusive": 1}, "workflow.exclusive"),
        ({"generators": [{"device": "cpu", "seed": 2**64}]}, "workflow.generators.0.seed"),
        ({"blobs": []}, "workflow.blobs"),
        ({"blobs": {}}, "workflow.arguments.image"),
    ],
)
def test_a_wrong_field_is_named(workflow, change, field):
    refused(values_of(workflow) | change, "got", field)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}'],
)
def test_other_texts_are_refused(text):
    refused(text, "workflow")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"more": 1}, r"^workflow.more: got 1, expected no such field$"),
        ({"exclusive": 1}, r"^workflow.exclusive: got 1, expected a valid boolean$"),
        (
            {"pipeline": {}},
            r"^workflow.pipeline.class_name: got None, expected a value: .* required",
        ),
        ({"seeds": [-1]}, r"^workflow.seeds.0: got -1, expected greater than or equal to 0$"),
        (
            {"pipeline": {"class_name": "X", "code_sha256": "no"}},
            r"^workflow.pipeline.code_sha256: got 'no', expected a sha256: 64 ",
        ),
    ],
)
def test_a_wrong_field_reads_well(workflow, change, match):
    refused(values_of(workflow) | change, match)


def test_where_a_text_stops_being_json():
    refused(b'{"a":}', r"""got '{"a":}', expected valid JSON: .*line 1 column 6""")


HALF = "\ud83d"  # of a surrogate pair


@pytest.mark.parametrize(
    "change",
    [
        {"task": HALF},
        {"arguments": {"prompt": [f"a {HALF}"]}},
        {"arguments": {HALF: 1}},
        {HALF: 1},
    ],
)
def test_half_a_surrogate_pair_is_refused(workflow, change):
    values = values_of(workflow) | change
    refused(values, "lone surrogates")
    with pytest.raises(errors.InvalidWorkflow, match="lone surrogates") as caught:
        Workflow.from_json(json.dumps(values, ensure_ascii=False))
    str(caught.value).encode()


def test_whole_characters_come_back():
    text = "\U0001f600"
    assert Workflow.from_json(json.dumps(values_of(make(prompt=text)))) == make(prompt=text)


@pytest.mark.parametrize("name", ["../../secret", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n"])
def test_a_blob_is_named_by_a_sha256(tmp_path, name):
    (tmp_path / "secret.bin").write_bytes(b"secret")
    (tmp_path / "a" / "b" / "blobs").mkdir(parents=True)
    values = values_of(make()) | {"arguments": {"x": {"$kind": "other", "blob": name}}}
    file = tmp_path / "a" / "b" / "flow.json"
    file.write_text(json.dumps(values))
    with pytest.raises(errors.InvalidWorkflow, match="expected a sha256") as caught:
        Workflow.load(file)
    assert caught.value.field == "workflow.arguments.x"


def test_saving_without_a_blob_says_which(workflow, tmp_path):
    bare = Workflow.model_validate(workflow.model_dump())
    with pytest.raises(errors.InvalidWorkflow, match="missing") as caught:
        bare.save_workflow(tmp_path / "wf")
    assert caught.value.field == "workflow.arguments.image"
    assert not (tmp_path / "wf").exists()


def test_the_path_of_a_saved_file_is_intact(workflow, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = workflow.save_workflow("~/wf")
    assert path == tmp_path / "wf" / "diffusion_workflow.json"
    assert path.is_file()


def test_summary_of_a_strange_shape():
    odd = Workflow(
        pipeline=Pipeline(class_name="X"),
        arguments={"x": {"$kind": "tensor", "shape": 5}},
        output=Output(sha256="0" * 64, parts=[OutputPart(kind="i", shape=[1], sha256="0" * 64)]),
    )
    rows = dict(summarize(odd))
    assert rows["x"] == "tensor"
    assert rows["output"].startswith("1 part, ")


def test_a_changed_blob_names_its_field(workflow, tmp_path):
    workflow.save_workflow(tmp_path)
    for file in (tmp_path / "blobs").glob("*.png"):
        file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(errors.InvalidWorkflow, match="it was changed") as caught:
        Workflow.load(tmp_path)
    assert caught.value.field == "workflow.arguments.image"
    next((tmp_path / "blobs").glob("*.png")).unlink()
    with pytest.raises(errors.InvalidWorkflow, match="missing"):
        Workflow.load(tmp_path)
    values = values_of(workflow)
    values["blobs"] = dict.fromkeys(values["blobs"], base64.b64encode(b"x").decode())
    refused(values, "it was changed", "workflow.arguments.image")
    values["blobs"] = dict.fromkeys(values["blobs"], "no base64")
    refused(values, "base64")


@pytest.mark.parametrize("source", ["no_such", "/no/such.json", "../x", "owner/name/more"])
def test_a_missing_file_is_not_found(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ModelNotFound):
        Workflow.load(source)


def test_a_missing_file_is_not_called_a_model():
    with pytest.raises(errors.ModelNotFound) as caught:
        Workflow.load("nope.json")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert str(error).startswith("'nope.json': no such file, folder or hub repository")


@pytest.mark.parametrize(
    ("source", "is_asked"),
    [
        ("stabilityai/stable-diffusion-2.1", True),
        ("me/flow", True),
        *(
            (f"folder/file{suffix}", False)
            for suffix in (".json", ".zip", ".PNG", ".jpeg", ".webp")
        ),
    ],
)
def test_what_is_looked_up_on_the_hub(source, is_asked, monkeypatch):
    asked = []

    def download_file(repo_id, name, **_):
        asked.append(repo_id)
        raise errors.ModelNotFound(repo_id, "is not there")

    monkeypatch.setattr(bundles, "download_file", download_file)
    with pytest.raises(errors.ModelNotFound):
        Workflow.load(source)
    assert asked == [source] * is_asked


@pytest.mark.parametrize("filename", ["../x.json", "/x.json", "x.txt", "", "a/b.json"])
def test_a_file_name_stays_in_its_folder(workflow, tmp_path, filename):
    for function in (workflow.save_workflow, Workflow.load):
        with pytest.raises(errors.InvalidWorkflow, match="filename"):
            function(tmp_path, filename)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"$kind": "module", "name": "os"}, "one of array"),
        ({"$kind": "dtype", "name": "load"}, "dtype"),
        ({"$kind": "float", "value": "1"}, "float"),
        ({"$kind": "tuple"}, "tuple"),
        ({"$kind": "generator", "index": 9}, "generator"),
        ({"$kind": "generator", "index": "x"}, "generator"),
        ({"$kind": "device"}, "device"),
        ({"$kind": "image", "blob": "0" * 64}, "missing"),
        ({"$kind": "tensor"}, "tensor"),
    ],
)
def test_a_value_of_no_kind_of_ours_is_refused(value, match):
    broken = Workflow(pipeline=Pipeline(class_name="X"), arguments={"odd": [value]})
    with pytest.raises(errors.InvalidWorkflow, match=match) as caught:
        decode(broken)
    assert caught.value.field.startswith("workflow.arguments.odd[0]")


@pytest.mark.parametrize("kind", ["image", "tensor", "array", "pixels"])
def test_a_blob_of_another_kind_is_refused(kind):
    data = b"neither an image nor a tensor"
    name = hashlib.sha256(data).hexdigest()
    value = {"$kind": kind, "blob": name, "mode": "F", "size": [4, 4], "device": "cpu"}
    broken = Workflow(pipeline=Pipeline(class_name="X"), arguments={"odd": value})
    with pytest.raises(errors.InvalidWorkflow, match=f"a complete {kind}"):
        decode(broken.with_blobs({name: data}))


LIMITS = RequestLimits(
    max_side=64, max_pixels=64 * 64, max_steps=20, max_prompt_chars=50, max_frames=1
)


def bomb(side):
    """A PNG that is small as a file."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_a_image_is_measured_before_it_is_decoded():
    workflow = travel(make(image=bomb(4000)))
    with pytest.raises(errors.InvalidWorkflow, match="4000 x 4000 pixels") as caught:
        decode(workflow, bounds=Bounds.of(LIMITS))
    assert caught.value.field == "workflow.arguments.image"


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a.json": "{}", "b.json": "{}"}, "one JSON file"),
        ({"a.json": "{}", "../x": ""}, "one JSON file"),
        ({"a.json": "{}", "/etc/x": ""}, "one JSON file"),
        ({"blobs/x": ""}, "one JSON file"),
        ({"a.json": " " * (64 << 20)}, "a zip of 1 files with 67108864 bytes"),
        ({"a.json": "{}", **{f"blobs/{n}.bin": "" for n in range(20)}}, "at most 17 blobs"),
    ],
)
def test_a_zip_holds_one_workflow(files, match):
    refused(zip_of(files), match, limits=LIMITS)


def test_a_zip_of_many_files_is_refused_before_it_is_listed():
    files = {"a.json": "{}", **{f"blobs/{number}": "" for number in range(200)}}
    refused(zip_of(files), "a zip with more files", limits=LIMITS)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_stored_and_deflated_files_are_read(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.json", "{}")
    refused(buffer.getvalue(), "stored or deflated")


@pytest.mark.parametrize("name", ["a.json", f"blobs/{'0' * 64}.png"])
def test_a_zip_whose_header_lies_inflates_no_further(name, workflow):
    size = 64 << 20
    data = values_of(workflow) | {"arguments": {"x": {"$kind": "image", "blob": "0" * 64}}}
    files = {"a.json": json.dumps(data), name: bytes(size)}
    lying = zip_of(files).replace(struct.pack("<I", size), struct.pack("<I", 100))
    tracemalloc.start()
    refused(lying, "broken zip", limits=LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_broken_zip_is_refused():
    refused(zip_of({"a.json": "{}"})[:-10], "broken zip")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arguments": {"x": "a" * (2 << 20)}}, "characters"),
        ({"arguments": {"x": [0] * 30_000}}, "values"),
        ({"arguments": {f"x{n}": {"y": n} for n in range(15_000)}}, "values"),
    ],
)
def test_an_untrusted_text_is_bounded(workflow, change, match):
    refused(values_of(workflow) | change, match, limits=LIMITS)


def test_depth_is_bounded():
    deep: list = []
    for _ in range(100):
        deep = [deep]
    refused({"format": FORMAT, "version": 1, "arguments": {"x": deep}}, "levels")


def test_blobs_of_an_untrusted_workflow_are_bounded():
    many = make(image=[Image.new("L", (8, 8), color) for color in range(18)])
    refused(many.to_json(), "at most 17", limits=LIMITS)
    small = dataclasses.replace(LIMITS, max_upload_bytes=100)
    refused(make(image=IMAGE.convert("RGB")).to_json(), "at most", limits=small)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_inference_steps": 100_000}, "num_inference_steps"),
        ({"height": 65}, "height"),
        ({"width": 10**9}, "width"),
        ({"height": 64, "width": 64, "num_images_per_prompt": 2}, "height"),
        ({"prompt": ["a", "b"]}, "height"),
        ({"num_frames": 900}, "height"),
        ({"prompt": "a" * 51}, "prompt"),
        ({"prompt_2": ["a" * 51]}, "prompt_2"),
        ({"latents": torch.zeros(1)}, "latents"),
        ({"image": np.zeros(3)}, "image"),
        ({"input_images": ["/etc/passwd"]}, "input_images"),
        ({"image": "http://localhost"}, "image"),
        ({"max_sequence_length": 10**6}, "max_sequence_length"),
        ({"audio_length_in_s": 1e9}, "audio_length_in_s"),
        ({"timesteps": list(range(21))}, "timesteps"),
        ({"cross_attention_kwargs": {"scale": 1e6}}, "cross_attention_kwargs.scale"),
        ({"crop": (0, 10**9)}, "crop"),
    ],
)
def test_an_untrusted_workflow_asks_for_no_more_than_a_request_may(arguments, field):
    with pytest.raises(errors.InvalidWorkflow) as caught:
        check_limits(make(**arguments), LIMITS, {})
    assert caught.value.field == f"workflow.arguments.{field}"


def test_what_a_request_may_a_workflow_may():
    usual = {"prompt": "a cat", "image": IMAGE, "height": 64, "width": 64, "size": (1024, 1024)}
    generator = torch.Generator().manual_seed(2**31)
    check_limits(
        make(**usual, num_inference_steps=20, generator=generator), LIMITS, {"seed": 2**31}
    )
    check_limits(make(**usual, num_inference_steps=100), LIMITS, {"num_inference_steps": 5})
    with pytest.raises(errors.InvalidWorkflow, match="num_inference_steps"):
        check_limits(make(**usual), LIMITS, {"num_inference_steps": 21})
    with pytest.raises(errors.InvalidWorkflow, match="generators"):
        check_limits(make(generator=used_generator()), LIMITS, {})


@pytest.mark.parametrize("name", ["save_pretrained", "to", "_execution_device", "from_pretrained"])
def test_only_methods_that_generate_can_be_named(name):
    check_method(diffusers.StableDiffusionPipeline, "__call__")
    check_method(diffusers.StableDiffusionDiffEditPipeline, "invert")
    with pytest.raises(errors.InvalidWorkflow, match="takes a generator"):
        check_method(diffusers.StableDiffusionPipeline, name)


UPLOADS = """
import sys
from bentoml_diffusers import errors
from bentoml_diffusers.workflow import Workflow
given = Workflow.load(sys.argv[1])
given.save_workflow("one", push_to_hub=True, repo_id="me/flow", token="hf_right", private=True)
given.save_workflow("two", "all.zip", push_to_hub=True, token="hf_right")
assert Workflow.load("me/flow", token="hf_right") == given
assert Workflow.load("tester/two", "all.zip") == given
for call, error, text in (
    (lambda: given.save_workflow("x", push_to_hub=True, token="no"), errors.ModelNotFound, "token"),
    (lambda: Workflow.load("me/none"), errors.ModelNotFound, "me/none"),
    (lambda: Workflow.load("me/flow", "other.json"), errors.InvalidModel, "other.json"),
):
    try:
        call()
    except error as err:
        assert text in str(err), err
    else:
        raise AssertionError(text)
"""


def test_upload_and_download(workflow, tmp_path):
    path = workflow.save_workflow(tmp_path / "given")
    with hub.serve(hub.Hub({}, new_folder=tmp_path / "new")) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", UPLOADS, str(path)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert server.created["me/flow"]["visibility"] == "private"
    assert Workflow.load(tmp_path / "new" / "me" / "flow") == workflow
