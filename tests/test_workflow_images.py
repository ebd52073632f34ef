"""Workflows inside PNG, JPEG and WebP: there and back, and files that are made to do harm."""

import base64
import hashlib
import io
import json
import re
import struct
import sys
import zlib
from xml.etree import ElementTree

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from bentoml_diffusers.errors import InvalidOption, InvalidWorkflow
from bentoml_diffusers.options import EmbedOptions, RequestLimits
from bentoml_diffusers.workflow import Workflow
from bentoml_diffusers.workflow.files import (
    containers,
    embed_workflow,
    make_infotext,
    save_image,
    xmp,
)
from bentoml_diffusers.workflow.files.images import _write_texts

FORMATS = ("png", "jpeg", "webp")
SIZE = (48, 32)
NOISE = Image.effect_noise(SIZE, 60).convert("RGB")
MIB = 1024 * 1024

# modules/infotext_utils.py of AUTOMATIC1111's web UI 1.10
A1111_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def make_workflow(blob=b"", **arguments):
    """A workflow as a request makes it, with a blob where there is one."""
    values = {
        "format": "bentoml_diffusers.workflow",
        "version": 1,
        "task": "txt2img",
        "pipeline": {"class_name": "StableDiffusionPipeline", "model": {"tag": "demo:abc123"}},
        "arguments": {"prompt": "a red circle", **arguments},
        "seeds": [7],
        "scheduler": {"class_name": "PNDMScheduler", "config": {"skip_prk_steps": True}},
    }
    if blob:
        name = hashlib.sha256(blob).hexdigest()
        values["arguments"]["image"] = {"$kind": "image", "blob": name}
        values["blobs"] = {name: base64.b64encode(blob).decode()}
    return Workflow.from_json(json.dumps(values))


def encode(workflow, image_format, infotext=None, image=NOISE):
    buffer = io.BytesIO()
    arguments = containers.save_arguments(image_format, _write_texts(workflow), infotext)
    image.save(buffer, image_format, **arguments)
    return buffer.getvalue()


def open_image(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def assert_same(found, workflow):
    assert found == workflow
    assert found.blobs == workflow.blobs


class TestRoundTrip:
    @hypothesis.given(
        prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
        blob=st.binary(max_size=300),
        width=st.integers(1, 40),
        image_format=st.sampled_from(FORMATS),
    )
    @hypothesis.example("]]> & <b> \0 \ufffe\uffff \r\n \x85 🦁", b"", 8, "jpeg")
    @hypothesis.settings(max_examples=60, deadline=None)
    def test_any_text_comes_back(self, prompt, blob, width, image_format):
        workflow = make_workflow(blob, prompt=prompt)
        data = encode(workflow, image_format, image=Image.new("RGB", (width, 9)))
        assert_same(Workflow.from_bytes(data), workflow)
        assert open_image(data).size == (width, 9)

    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("size", [65_000, 66_000, 200_000, 3 * MIB])
    def test_more_than_a_segment_holds(self, image_format, size):
        """Random bytes, so that nothing gets small by compression."""
        blob = hashlib.shake_128(b"blob").digest(size)
        workflow = make_workflow(blob)
        data = encode(workflow, image_format)
        assert_same(Workflow.from_bytes(data), workflow)
        assert open_image(data).format == image_format.upper()

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_pixels_stay(self, image_format):
        plain, carrying = io.BytesIO(), encode(make_workflow(), image_format, "a\nSteps: 1")
        NOISE.save(plain, image_format)
        assert open_image(carrying).tobytes() == open_image(plain.getvalue()).tobytes()

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
    def test_file(self, tmp_path, suffix):
        workflow = make_workflow(b"blob")
        path = save_image(NOISE, tmp_path / f"image{suffix}", workflow, infotext=True)
        assert_same(Workflow.load(path), workflow)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
    def test_modes(self, tmp_path, mode):
        for suffix in (".png", ".jpg", ".webp"):
            path = save_image(NOISE.convert(mode), tmp_path / f"a{suffix}", make_workflow())
            assert Workflow.load(path) == make_workflow()

    def test_unknown_suffix(self, tmp_path):
        with pytest.raises(InvalidWorkflow, match=r"path: got 'a.gif', expected .*\.webp"):
            save_image(NOISE, tmp_path / "a.gif", make_workflow())
        assert list(tmp_path.iterdir()) == []

    def test_too_large_for_a_image(self, tmp_path):
        with pytest.raises(InvalidWorkflow, match="at most 50331648 in an image"):
            save_image(NOISE, tmp_path / "a.png", make_workflow(bytes(40 * MIB)))
        assert list(tmp_path.iterdir()) == []


class TestEmbedOptions:
    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("has_workflow", [True, False])
    @pytest.mark.parametrize("has_infotext", [True, False])
    def test_each_arrives(self, image_format, has_workflow, has_infotext):
        options = EmbedOptions(workflow=has_workflow, infotext=has_infotext)
        embedding = embed_workflow(make_workflow(), NOISE, image_format, options)
        buffer = io.BytesIO()
        NOISE.save(buffer, image_format, **embedding.arguments)
        data, info = buffer.getvalue(), open_image(buffer.getvalue()).info
        assert (read_or_none(data) is not None) == has_workflow
        assert (b"Seed: 7" in data.replace(b"\0", b"")) == has_infotext
        if not (has_workflow or has_infotext):
            assert not {"exif", "xmp", "parameters"} & set(info)

    def test_size(self):
        workflow = make_workflow(bytes(100_000))
        for limit, is_whole in ((100_000, False), (200_000, True)):
            options = EmbedOptions(workflow=True, infotext=True, max_workflow_bytes=limit)
            embedding = embed_workflow(workflow, NOISE, "png", options)
            assert embedding.is_whole == is_whole
            texts = embedding.arguments["pnginfo"].chunks
            assert any(KEY in content for _, content, *_ in texts) == is_whole
            assert any(b"parameters" in content for _, content, *_ in texts)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("workflow", "no"), ("infotext", 1), ("max_workflow_bytes", -1),
         ("max_workflow_bytes", 2**30)],
    )  # fmt: skip
    def test_wrong_values(self, name, value):
        with pytest.raises(InvalidOption, match=name):
            EmbedOptions(**{name: value})


class TestKeys:
    def test_png_has_our_key_compressed_and_not_those_of_comfyui(self):
        data = encode(make_workflow(b"blob"), "png", "a\nSteps: 1")
        info = open_image(data).info
        assert json.loads(info["diffusers_workflow"])["arguments"]["prompt"] == "a red circle"
        assert info["parameters"] == "a\nSteps: 1"
        assert not {"workflow", "prompt"} & set(info)
        assert b"iTXtdiffusers_workflow\0\1\0" in data

    @pytest.mark.parametrize("image_format", ["jpeg", "webp"])
    def test_xmp_is_as_adobe_says(self, image_format):
        packet = open_image(encode(make_workflow(), image_format)).info["xmp"]
        assert packet.startswith(b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>')
        (description,) = ElementTree.fromstring(packet)[0]
        text = description.findtext("{urn:bentoml-diffusers:workflow/}diffusers_workflow")
        assert json.loads(text)["arguments"]["prompt"] == "a red circle"

    def test_extended_xmp_is_as_adobe_says(self):
        data = encode(make_workflow(hashlib.shake_128(b"b").digest(90_000)), "jpeg")
        segments = list(containers._jpeg_segments(data))
        (main,) = [one for one in segments if one.startswith(b"http://ns.adobe.com/xap/1.0/\0")]
        parts = [one for one in segments if one.startswith(b"http://ns.adobe.com/xmp/extension/\0")]
        extended = b"".join(part[75:] for part in parts)
        assert hashlib.md5(extended).hexdigest().upper().encode() in main
        assert [struct.unpack(">II", part[67:75]) for part in parts] == [
            (len(extended), 65400 * number) for number in range(len(parts))
        ]


def read_a1111(text):
    """Reads the text as the web UI does: prompt, negative prompt, the rest."""
    *lines, last = text.strip().split("\n")
    assert len(A1111_PARAMETER.findall(last)) >= 3
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    values = {
        name: json.loads(value) if value[:1] == '"' else value
        for name, value in A1111_PARAMETER.findall(last)
    }
    return prompt, negative.strip(), values


class TestInfotext:
    def test_as_the_web_ui_reads_it(self):
        workflow = make_workflow(
            negative_prompt="blurred,\nugly: very",
            num_inference_steps=20,
            guidance_scale=5.5,
            strength=0.6,
            clip_skip=1,
        ).model_copy(update={"adapters": make_adapters()})
        prompt, negative, values = read_a1111(make_infotext(workflow, SIZE))
        assert prompt == "a red circle <lora:outline:0.8> <lora:in-a-folder:-1>"
        assert negative == "blurred,\nugly: very"
        assert values == {
            "Steps": "20",
            "Sampler": "PLMS",
            "CFG scale": "5.5",
            "Seed": "7",
            "Size": "48x32",
            "Model": "demo",
            "Denoising strength": "0.6",
            "Clip skip": "2",
        }

    @hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    def test_values_with_separators_are_quoted(self, tag):
        hypothesis.assume(tag.strip() == tag and ":" not in tag and "\r" not in tag)
        workflow = make_workflow(num_inference_steps=2, guidance_scale=1.0)
        model = workflow.pipeline.model.model_copy(update={"tag": tag})
        pipeline = workflow.pipeline.model_copy(update={"model": model})
        text = make_infotext(workflow.model_copy(update={"pipeline": pipeline}), SIZE)
        assert read_a1111(text)[2]["Model"] == tag

    @pytest.mark.parametrize(
        ("prompt", "written"),
        [
            ("a (red:1.4) [star]", r"a \(red:1.4\) \[star\]"),
            (r"a \(red\)", r"a \\\(red\\\)"),
            ("a <lora:x:0.8> <teal>", "a lora:x:0.8 <teal>"),
            ("a cat AND a dog BREAK", "a cat and a dog break"),
            ("BRAND new: sand", "BRAND new: sand"),
        ],
    )
    def test_no_syntax_that_was_read_as_letters(self, prompt, written):
        workflow = make_workflow(prompt=prompt, negative_prompt=prompt, guidance_scale=1.0)
        assert read_a1111(make_infotext(workflow, SIZE))[:2] == (written, written)

    def test_second_image_of_several_prompts(self):
        workflow = make_workflow(prompt=["a", "b"], num_images_per_prompt=2)
        workflow = workflow.model_copy(update={"seeds": [1, 2, 3, 4]})
        prompt, _, values = read_a1111(make_infotext(workflow, SIZE, 2))
        assert (prompt, values["Seed"]) == ("b", "3")

    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("text", ["a cat\nSteps: 1, Seed: 2", "🦁 Löwe\nSteps: 1, Seed: 2"])
    def test_where_the_web_ui_looks(self, image_format, text):
        image = open_image(encode(make_workflow(), image_format, text))
        if image_format == "png":
            assert image.info["parameters"] == text
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + text.encode("utf-16-be")

    def test_too_long_for_a_jpeg_is_left_out(self):
        data = encode(make_workflow(), "jpeg", "a" * 40_000)
        assert "exif" not in open_image(data).info
        assert Workflow.from_bytes(data) == make_workflow()


def make_adapters():
    from bentoml_diffusers.workflow.files import Adapter

    values = {"kind": "lora", "sha256": "0" * 64}
    return [
        Adapter(name="outline:abc", scale=0.8, **values),
        Adapter(name="styles/in-a-folder.safetensors", scale=-1.0, **values),
        Adapter(name="teal", kind="textual_inversion", sha256="0" * 64),
    ]


def png(*chunks):
    """A PNG with chunks after its header; ``(kind, content)`` each."""
    buffer = io.BytesIO()
    NOISE.save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(make_chunk(*chunk) for chunk in chunks) + data[33:]


def make_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def jpeg(*segments):
    buffer = io.BytesIO()
    NOISE.save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"".join(map(xmp._make_segment, segments)) + data[2:]


def webp(packet):
    buffer = io.BytesIO()
    NOISE.save(buffer, "WEBP", xmp=packet)
    return buffer.getvalue()


KEY = b"diffusers_workflow"
BOMB = zlib.compress(bytes(100 * MIB))
LAUGHS = (
    b"""<!DOCTYPE x [<!ENTITY a "haha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><x>&b;</x>"""
)
OWN = b'<a xmlns:d="urn:bentoml-diffusers:workflow/"><d:a>'
EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
XAP = b"http://ns.adobe.com/xap/1.0/\0"
LONG = xmp.make_segments(xmp.make_packet({KEY.decode(): "a" * 100_000}))


def with_extension(*parts):
    """A JPEG that announces extended XMP ``A...A``, and parts of it as (length, offset, data)."""
    note = XAP + xmp._wrap(
        f'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="{"A" * 32}"', ""
    )
    pack = xmp._FIELDS.pack
    return jpeg(note, *(EXTENSION + pack(b"A" * 32, *fields) + data for *fields, data in parts))


BAD = {
    "without one": (png(), "an image without one"),
    "jpeg without one": (jpeg(), "an image without one"),
    "iTXt bomb": (png((b"iTXt", KEY + b"\0\1\0\0\0" + BOMB)), "too much text"),
    "zTXt bomb": (png((b"zTXt", KEY + b"\0\0" + BOMB)), "too much text"),
    "many bombs": (
        png(*[(b"iTXt", KEY + b"\0\1\0\0\0" + zlib.compress(bytes(MIB)))] * 60),
        "too much text",
    ),
    "broken stream": (png((b"iTXt", KEY + b"\0\1\0\0\0no zlib")), "compressed text"),
    "half a stream": (png((b"iTXt", KEY + b"\0\1\0\0\0" + BOMB[:40])), "is truncated"),
    "no UTF-8": (png((b"iTXt", KEY + b"\0\0\0\0\0\xff\xff")), "not UTF-8"),
    "no JSON": (png((b"tEXt", KEY + b"\0[1, 2")), "expected valid JSON"),
    "no object": (png((b"tEXt", KEY + b"\0[1, 2]")), "an object"),
    "empty": (png((b"tEXt", KEY)), "expected valid JSON"),
    "deep": (png((b"tEXt", KEY + b"\0" + b"[" * 100_000)), "expected valid JSON"),
    "two of them": (png(*[(b"tEXt", KEY + b'\0{"version": 1}')] * 2), "expected valid JSON"),
    "of ComfyUI": (png((b"tEXt", KEY + b'\0{"last_node_id": 9}')), "workflow.format"),
    "damaged": (
        png((b"tEXt", KEY + b"\0{}")).replace(b"workflow\0{}", b"workflow\0{]"),
        "damaged",
    ),
    "document type": (webp(LAUGHS), "document type"),
    "document type in a JPEG": (jpeg(XAP + LAUGHS), "document type"),
    "not XML": (webp(b"<x"), "not valid XML"),
    "no text": (webp(b"\xff\xfe<\0x\0>\0"), "not valid XML"),
    "deep XML": (webp(b"<a>" * 100_000), "deeper than 32"),
    "many tags": (webp(b"<a>" + b"<b/>" * 11_000 + b"</a>"), "more than 10000 elements"),
    "many tags in a text": (
        webp(OWN + b"<b/>" * 11_000 + b"</d:a></a>"),
        "more than 10000 elements",
    ),
    "many attributes in a text": (
        webp(OWN + b"<b " + b" ".join(b'x%d=""' % number for number in range(200_000)) + b"/>"),
        "of other programs",
    ),
    "many packets": (jpeg(*[XAP + b"<a/>"] * 17), "more than 16 XMP packets"),
    "many segments": (jpeg(*[b""] * 10_000), "more than 10000 segments"),
    "many markers": (b"\xff\xd8\xff\x01" + b"\xff\x01" * 10_000, "more than 10000 segments"),
    "many empty chunks": (png(*[(b"juNk", b"")] * 10_000), "more than 10000 chunks"),
    "many chunks of a WebP": (webp(b"")[:12] + b"junk\0\0\0\0" * 10_001, "more than 10000 chunks"),
    "many attributes": (
        webp(b"<a " + b" ".join(b'x%d=""' % number for number in range(200_000)) + b"/>"),
        "of other programs",
    ),
    "many texts": (
        webp(
            b'<a xmlns="urn:bentoml-diffusers:workflow/">'
            + b"".join(b"<x%d/>" % number for number in range(9000))
            + b"</a>"
        ),
        "more than 5000 texts",
    ),
    "many chunks": (
        png(*((b"tEXt", b"diffusers_%d\0" % number) for number in range(9000))),
        "more than 5000 texts",
    ),
    "many lists": (
        png((b"iTXt", KEY + b"\0\1\0\0\0" + zlib.compress(b"[" + b"[]," * 10**7))),
        "at",
    ),
    "gap": (with_extension((9, 0, b"<a>"), (9, 5, b"</a>")), "gap"),
    "overlap": (with_extension((9, 0, b"<a>12"), (9, 3, b"</a>")), "gap"),
    "end missing": (with_extension((99, 0, b"<a></a>")), "ends at byte 7 of 99"),
    "nothing of it": (with_extension(), "ends at byte 0"),
    "huge extension": (with_extension((2**32 - 1, 0, b"<a></a>")), "expected at most"),
}


def read_or_none(data):
    """No other error than ours may come out of a file."""
    try:
        return Workflow.from_bytes(data).to_json()
    except InvalidWorkflow:
        return None


def count_lines(function, *args):
    """How many lines of the readers run, whatever the machine."""
    n_lines = 0

    def trace(frame, event, _):
        nonlocal n_lines
        n_lines += event == "line"
        return trace if frame.f_code.co_filename in (containers.__file__, xmp.__file__) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return n_lines


class TestBadFiles:
    def test_filling_is_skipped_at_once(self):
        """Bytes of 0xFF before a marker, and a text of many small pieces."""
        own = encode(make_workflow(), "jpeg")
        filled = own[:2] + b"\xff" * MIB + own[2:]
        assert Workflow.from_bytes(filled) == make_workflow()
        assert count_lines(read_or_none, filled) < 1000
        assert count_lines(read_or_none, own[:2] + b"\xff" * MIB) < 1000

    def test_a_text_of_many_pieces_is_read_at_once(self):
        prompt = "&\n" * 100_000
        own = encode(make_workflow(prompt=prompt), "webp")
        assert Workflow.from_bytes(own).arguments["prompt"] == prompt
        assert count_lines(read_or_none, own) < 2000

    @pytest.mark.parametrize("case", BAD)
    def test_refused_with_the_reason(self, case):
        data, reason = BAD[case]
        with pytest.raises(InvalidWorkflow, match=f"^workflow.*{reason}|^{reason}"):
            Workflow.from_bytes(data)

    @pytest.mark.parametrize("case", BAD)
    def test_limits_of_a_service_refuse_no_less(self, case):
        with pytest.raises(InvalidWorkflow, match=r"^workflow"):
            Workflow.from_bytes(BAD[case][0], RequestLimits())

    def test_bombs_cost_no_memory(self):
        import tracemalloc

        tracemalloc.start()
        with pytest.raises(InvalidWorkflow):
            Workflow.from_bytes(BAD["iTXt bomb"][0], RequestLimits(max_upload_bytes=MIB))
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
        tracemalloc.stop()

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_cut_off_anywhere(self, image_format):
        """A file that ends too early has its workflow whole, or says that it has none."""
        workflow = make_workflow(b"blob")
        data = encode(workflow, image_format)
        outcomes = {read_or_none(data[:end]) for end in range(16, len(data), 7)}
        assert outcomes <= {workflow.to_json(), None}
        assert None in outcomes

    @hypothesis.given(
        position=st.integers(0, 2**20),
        junk=st.binary(min_size=1, max_size=8),
        image_format=st.sampled_from(FORMATS),
    )
    @hypothesis.settings(max_examples=100, deadline=None)
    def test_junk_in_the_middle(self, position, junk, image_format):
        data = encode(make_workflow(b"blob"), image_format)
        position %= len(data)
        read_or_none(data[:position] + junk + data[position + len(junk) :])

    def test_changed_blob(self):
        blob = b"the image that went in"
        name = hashlib.sha256(blob).hexdigest()
        texts = _write_texts(make_workflow(blob))
        texts[f"diffusers_blob_{name}"] = texts[f"diffusers_blob_{name}"][::-1]
        buffer = io.BytesIO()
        NOISE.save(buffer, "PNG", **containers.save_arguments("png", texts))
        with pytest.raises(InvalidWorkflow, match=r"workflow\.(arguments\.image|diffusers_blob)"):
            Workflow.from_bytes(buffer.getvalue())

    def test_missing_blob(self):
        texts = {"diffusers_workflow": _write_texts(make_workflow(b"x"))["diffusers_workflow"]}
        buffer = io.BytesIO()
        NOISE.save(buffer, "PNG", **containers.save_arguments("png", texts))
        with pytest.raises(InvalidWorkflow, match=r"workflow\.arguments\.image: .* is missing"):
            Workflow.from_bytes(buffer.getvalue())

    def test_a_text_of_another_program_is_left_alone(self):
        """A bomb under a key that is not ours is never opened."""
        own = (b"iTXt", KEY + b"\0\0\0\0\0" + make_workflow().to_json().encode())
        data = png((b"iTXt", b"workflow\0\1\0\0\0" + BOMB), (b"tEXt", b"prompt\0junk"), own)
        assert Workflow.from_bytes(data) == make_workflow()
