"""`POST /replay` of `bentoml diffusers demo`: images are generated again, within limits."""

import base64
import copy
import hashlib
import io
import json
import re
import struct
import sys
import zlib

import pytest
import torch
from PIL import Image
from processes import ROOT
from safetensors.torch import save

import bentoml_diffusers
from bentoml_diffusers import Engine, ModelOptions, RequestLimits, errors, testing
from bentoml_diffusers.serving.endpoints import classic_endpoints, find_endpoints
from bentoml_diffusers.serving.replays import read_overrides
from bentoml_diffusers.workflow import Workflow


def make_latents(side):
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3))
    return base64.b64encode(save({"latents": noise})).decode()


SECRET = "a big red circle on a blue background at the left"
CALLS = {
    "plain": {"seed": 5},
    "all choices": {
        "seed": 6,
        "prompt": "a small <teal> star on a white background in the centre",
        "negative_prompt": "blurred",
        "guidance_scale": 3,
        "height": 72,
        "scheduler": "DPM++ 2M Karras",
        "lora_weights": [{"name": "outline", "scale": 0.8}, {"name": "stripes", "scale": 0.3}],
        "textual_inversions": [{"name": "teal", "token": "<teal>"}],
    },
    "scales by block": {
        "seed": 8,
        "lora_weights": [{"name": "outline", "scale": {"unet": {"down": 0.3, "mid": 0}}}],
    },
    "drawn seed": {},
    "latents": {"height": 64, "width": 64, "seed": 1, "latents": make_latents(16)},
}


def generate(server, path="/txt2img", **fields):
    body = {"prompt": SECRET, "num_inference_steps": 4, **fields}
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def replay(server, file, **fields):
    data = {key: json.dumps(value) for key, value in fields.items() if key != "output_format"}
    if "output_format" in fields:
        data["output_format"] = fields["output_format"]
    return server.client.post("/replay", files={"workflow": ("file", file)}, data=data)


@pytest.fixture(scope="module")
def start():
    """An image to start from, in base64."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def generated(demo_server, start):
    """Answers by name."""
    answers = {name: generate(demo_server, **call) for name, call in CALLS.items()}
    answers["over another"] = generate(demo_server, "/img2img", image=start, seed=7)
    return answers


@pytest.fixture(scope="module")
def values(generated):
    """Workflows by name, as JSON with their blobs; each call gives new ones."""
    texts = {
        name: Workflow.from_bytes(answer.content).to_json() for name, answer in generated.items()
    }
    return lambda name="plain": json.loads(texts[name])


class TestRoundTrip:
    @pytest.mark.parametrize("name", [*CALLS, "over another"])
    def test_png_generates_itself_again(self, demo_server, generated, open_image, name):
        original = generated[name]
        assert original.headers["x-workflow"] == "embedded"
        again = replay(demo_server, original.content)
        assert again.status_code == 200, again.text
        assert again.headers["x-workflow-match"] == "true"
        assert again.headers["x-seed"] == original.headers["x-seed"]
        assert open_image(again.content).tobytes() == open_image(original.content).tobytes()
        assert Workflow.from_bytes(again.content).output.sha256
        third = replay(demo_server, again.content)
        assert third.status_code == 200, third.text
        assert third.content == again.content

    @pytest.mark.parametrize("output_format", ["jpeg", "webp"])
    def test_other_formats(self, demo_server, open_image, output_format):
        original = generate(demo_server, seed=5, output_format=output_format).content
        again = replay(demo_server, original, output_format=output_format)
        assert again.headers["x-workflow-match"] == "true"
        assert again.headers["content-type"] == f"image/{output_format}"
        assert open_image(again.content).tobytes() == open_image(original).tobytes()

    def test_what_is_left_out_must_have_a_default(self, demo_server, values):
        whole = values()
        whole["arguments"]["num_inference_steps"] = None
        answer = replay(demo_server, json.dumps(whole).encode())
        assert answer.status_code == 400
        assert "num_inference_steps" in answer.text

    @pytest.mark.parametrize("task", [None, "__call__"])
    def test_a_workflow_that_says_its_class_only(self, demo_server, values, task):
        answer = replay(demo_server, json.dumps({**values(), "task": task}).encode())
        assert answer.headers.get("x-workflow-match") == "true", answer.text

    def test_a_class_of_another_task(self, demo_server, values):
        whole = values()
        whole["pipeline"]["class_name"] = "StableDiffusionInpaintPipeline"
        for strict in (True, False):
            answer = replay(demo_server, json.dumps(whole).encode(), strict=strict)
            assert answer.status_code == 400, answer.text
            assert "workflow.pipeline.class_name" in answer.text

    def test_names_that_no_answer_can_carry(self, demo_server, values):
        body = json.dumps({"workflow": values(), "overrides": {"\ud800": 1}})
        headers = {"content-type": "application/json"}
        answer = demo_server.client.post("/replay", content=body, headers=headers)
        assert answer.status_code == 400

    def test_json_and_zip(self, demo_server, generated, values, tmp_path):
        workflow = Workflow.from_json(json.dumps(values()))
        whole = values()
        image = base64.b64encode(generated["plain"].content).decode()
        for body in (whole, {"workflow": whole}, {"workflow": image, "strict": True}):
            answer = demo_server.client.post("/replay", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-workflow-match"] == "true"
        zipped = workflow.save_workflow(tmp_path, "workflow.zip").read_bytes()
        assert replay(demo_server, zipped).headers["x-workflow-match"] == "true"

    def test_overrides(self, demo_server, generated, open_image):
        changes = {"num_inference_steps": 5, "seed": 9, "lora_weights": [{"name": "stripes"}]}
        answer = replay(demo_server, generated["plain"].content, overrides=changes)
        assert answer.status_code == 200, answer.text
        assert "x-workflow-match" not in answer.headers
        asked = generate(demo_server, **changes)
        assert open_image(answer.content).tobytes() == open_image(asked.content).tobytes()

    def test_overrides_that_draw_a_seed_or_say_nothing(self, demo_server, generated):
        whole = generated["plain"].content
        drawn = replay(demo_server, whole, overrides={"seed": -1})
        assert drawn.status_code == 200, drawn.text
        assert drawn.headers["x-seed"] != generated["plain"].headers["x-seed"]
        same = replay(demo_server, whole, overrides={"seed": None, "height": None})
        assert same.headers["x-workflow-match"] == "true"

    def test_another_image_goes_in(self, demo_server, generated, encode, open_image):
        grey = base64.b64encode(encode(size=(64, 64))).decode()
        changes = {"image": grey, "strength": 0.9}
        answer = replay(demo_server, generated["over another"].content, overrides=changes)
        assert answer.status_code == 200, answer.text
        assert answer.content != generated["over another"].content

    def test_hash_that_does_not_match(self, demo_server, values):
        changed = values()
        changed["output"] = {
            "sha256": "0" * 64,
            "parts": [{"kind": "image RGB", "shape": [64, 64], "sha256": "0" * 64}],
        }
        answer = demo_server.client.post("/replay", json=changed)
        assert answer.status_code == 200
        assert answer.headers["x-workflow-match"] == "false"

    def test_other_weights_unless_not_strict(self, demo_server, values):
        changed = values()
        changed["pipeline"]["model"]["tree_sha256"] = "0" * 64
        refused = demo_server.client.post("/replay", json=changed)
        assert refused.status_code == 409
        assert refused.json()["detail"][0]["loc"] == ["workflow.pipeline.model"]
        answer = demo_server.client.post("/replay", json={"workflow": changed, "strict": False})
        assert answer.status_code == 200
        assert answer.headers["x-workflow-match"] == "true"

    def test_file_opens_with_nothing_of_comfyui(self, generated, open_image):
        info = open_image(generated["plain"].content).info
        assert set(info) == {"diffusers_workflow"}


def put(path, value):
    """Changes one value of a workflow; `path` is dotted, `a.0.b`."""

    def change(values):
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            values = values[part]
        values[last] = value

    change.__name__ = f"{path}={value!r:.20}"
    return change


def huge_image(values):
    """A PNG that says it has 50,000 x 50,000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    use_blob(values, b"\x89PNG\r\n\x1a\n" + chunk)


def use_blob(values, data):
    values["arguments"]["image"]["blob"] = add_blob(values, data)


def add_blob(values, data):
    name = hashlib.sha256(data).hexdigest()
    values["blobs"][name] = base64.b64encode(data).decode()
    return name


def change_blob(values):
    values["blobs"] = {name: text[:-8] + "AAAAAAA=" for name, text in values["blobs"].items()}


def drop_blob(values):
    values["blobs"] = {}


def huge_latents(values):
    values["arguments"]["latents"]["blob"] = add_blob(values, base64.b64decode(make_latents(64)))


def many_loras(values):
    values["adapters"] = values["adapters"][:1] * 17


TENSOR = {"$kind": "tensor", "blob": "0" * 64, "dtype": "float32", "shape": [1], "device": "cpu"}
BAD = [
    # What is changed, in which workflow, the status and the field that the answer names.
    (put("version", 99), "plain", 400, "workflow.version"),
    (put("version", "1"), "plain", 400, "workflow.version"),
    (put("pipeline", []), "plain", 400, "workflow.pipeline"),
    (put("surprise", 1), "plain", 400, "workflow.surprise"),
    (put("task", "upscale"), "plain", 400, "workflow.task"),
    (put("task", "inpaint"), "plain", 400, "workflow.pipeline.class_name"),
    (put("task", "img2img"), "plain", 400, "workflow.pipeline.class_name"),
    (put("pipeline.method", "save_pretrained"), "plain", 400, "workflow.pipeline.method"),
    (put("pipeline.class_name", "FluxPipeline"), "plain", 409, "workflow.pipeline.class_name"),
    (put("pipeline.code_sha256", "0" * 64), "plain", 409, "workflow.pipeline.code_sha256"),
    (put("arguments.num_inference_steps", 100_000), "plain", 400, "num_inference_steps"),
    (put("arguments.num_inference_steps", "four"), "plain", 400, "num_inference_steps"),
    (put("arguments.num_inference_steps", True), "plain", 400, "num_inference_steps"),
    (put("arguments.height", 100_000), "plain", 400, "workflow.arguments.height"),
    (put("arguments.height", 63), "plain", 400, "workflow.arguments.height"),
    (put("arguments.prompt", "x" * 2001), "plain", 400, "workflow.arguments.prompt"),
    (put("arguments.prompt", ["a"] * 100), "plain", 400, "workflow.arguments.prompt"),
    (put("arguments.prompt", {"$kind": "bytes"}), "plain", 400, "workflow.arguments.prompt"),
    (put("arguments.guidance_scale", 1e6), "plain", 400, "workflow.arguments.guidance_scale"),
    (put("arguments.num_images_per_prompt", 50), "plain", 400, "num_images_per_prompt"),
    (put("arguments.output_type", "latent"), "plain", 400, "workflow.arguments.output_type"),
    (put("arguments.timesteps", [1] * 1000), "plain", 400, "workflow.arguments.timesteps"),
    (put("arguments.latents", TENSOR), "plain", 400, "workflow.arguments.latents"),
    (huge_latents, "latents", 400, "latents"),
    (put("arguments.height", None), "latents", 400, "workflow.arguments.latents"),
    (
        put("arguments.cross_attention_kwargs", {"scale": 0.5}),
        "plain",
        400,
        "cross_attention_kwargs",
    ),
    (put("arguments.nonsense", 1), "plain", 400, "workflow.arguments.nonsense"),
    (put("arguments.__class__", 1), "plain", 400, "workflow.arguments.__class__"),
    (put("seeds", [1, 2]), "plain", 400, "workflow.seeds"),
    (put("seeds", [-1]), "plain", 400, "workflow.seeds"),
    (put("arguments.generator", {"$kind": "generator", "index": 0}), "plain", 400, "generator"),
    (put("scheduler.requested", "os.system"), "plain", 400, "scheduler"),
    (put("scheduler.class_name", "PNDMScheduler"), "plain", 400, "workflow.scheduler"),
    (put("scheduler.config.num_train_timesteps", 10**9), "plain", 400, "workflow.scheduler"),
    (put("scheduler.config.beta_end", 0.5), "plain", 400, "workflow.scheduler"),
    (put("adapters.0.sha256", "0" * 64), "all choices", 409, "workflow.adapters[0]"),
    (put("pipeline.model.tree_sha256", "0" * 64), "plain", 409, "workflow.pipeline.model"),
    (put("adapters.0.scale", 1e6), "all choices", 400, "workflow.adapters"),
    (put("adapters.0.arguments", {"subfolder": ".."}), "all choices", 400, "workflow.adapters[0]"),
    (many_loras, "all choices", 400, "workflow.adapters"),
    (change_blob, "over another", 400, "workflow.arguments.image"),
    (drop_blob, "over another", 400, "workflow.arguments.image"),
    (huge_image, "over another", 400, "workflow.arguments.image"),
    (lambda values: use_blob(values, b"no image"), "over another", 400, "arguments.image"),
    (put("arguments.image", "/etc/passwd"), "over another", 400, "workflow.arguments.image"),
    (put("arguments.image", None), "over another", 400, "workflow.arguments.image"),
    (put("arguments.strength", 0.01), "over another", 400, "strength"),
    (put("arguments.strength", 2), "over another", 400, "workflow.arguments.strength"),
]


@pytest.fixture
def refused(demo_server):
    """Checks an answer that must be an error of ours; returns status and field."""

    def check(answer):
        assert 400 <= answer.status_code < 500, answer.text
        for inside in (str(ROOT), sys.prefix, "Traceback", 'File "'):
            assert inside not in answer.text
        if answer.status_code == 409:  # nor a hash of a file
            assert not re.search("[0-9a-f]{20}", answer.text)
        field = str(answer.json()["detail"][0]["loc"][0])
        assert answer.json()["error"].count(f"{field}: ") <= 1
        return answer.status_code, field

    return check


class TestStrangers:
    @pytest.mark.parametrize(
        ("change", "name", "status", "field"), BAD, ids=lambda part: getattr(part, "__name__", None)
    )
    def test_field_is_named(self, demo_server, values, refused, change, name, status, field):
        workflow = values(name)
        change(workflow)
        got = refused(demo_server.client.post("/replay", json={"workflow": workflow}))
        assert got[0] == status
        assert field in got[1]

    @pytest.mark.parametrize(
        ("name", "status"),
        [
            ("no-such-lora", 404),
            ("/etc/passwd", 400),
            ("../../x.safetensors", 400),
            ("somebody/some-lora", 400),
            ("https://example.com/x.safetensors", 400),
        ],
    )
    @pytest.mark.parametrize("strict", [True, False])
    def test_names_of_adapters(self, demo_server, values, refused, name, status, strict):
        workflow = values("all choices")
        workflow["adapters"] = workflow["adapters"][:1]
        workflow["adapters"][0] |= {"name": name, "tag": name}
        workflow["arguments"]["prompt"] = "a star"
        answer = demo_server.client.post("/replay", json={"workflow": workflow, "strict": strict})
        if not strict and status == 404:
            assert answer.status_code == 200
            assert answer.headers["x-workflow-match"] == "false"
        else:
            assert refused(answer)[0] == status

    @pytest.mark.parametrize(
        ("overrides", "field"),
        [
            ({"num_inference_steps": 100_000}, "overrides.num_inference_steps"),
            ({"prompt": 5}, "overrides.prompt"),
            ({"stebs": 5}, "overrides.stebs"),
            ({"output_format": "png"}, "overrides.output_format"),
            ({"exclusive": False}, "overrides.exclusive"),
            ({"timeout_s": 1e9}, "overrides.timeout_s"),
            ({"height": 4096}, "overrides.height"),
            ({"lora_weights": [{"name": "outline", "scale": 1e9}]}, "overrides.lora_weights"),
            ({"image": "aGFsbG8="}, "overrides.image"),
            ([1], "overrides"),
        ],
        ids=str,
    )
    def test_overrides(self, demo_server, generated, refused, overrides, field):
        answer = replay(demo_server, generated["plain"].content, overrides=overrides)
        got = refused(answer)
        assert got[0] == 400
        assert got[1].startswith(field)

    def test_all_unknown_overrides_are_named(self, demo_server, generated, refused):
        answer = replay(demo_server, generated["plain"].content, overrides={"steps": 5, "foo": 1})
        assert refused(answer)[0] == 400
        detail = answer.json()["detail"]
        assert [one["loc"] for one in detail] == [["overrides.steps"], ["overrides.foo"]]
        assert "did you mean 'num_inference_steps'?" in detail[0]["msg"]

    @pytest.mark.parametrize(
        ("field", "value", "status"),
        [
            ("lora_weights", "outlin", 404),
            ("lora_weights", "../outline.safetensors", 400),
            ("textual_inversions", "tael", 404),
            ("scheduler", "Eular a", 400),
        ],
    )
    def test_names_among_overrides(self, demo_server, generated, refused, field, value, status):
        answer = replay(demo_server, generated["plain"].content, overrides={field: value})
        assert refused(answer)[0] == status
        assert answer.json()["error"].startswith(f"overrides.{field}: ")
        assert answer.json()["detail"][0]["loc"] == [f"overrides.{field}"]

    def test_files(self, demo_server, generated, refused, encode):
        whole = generated["plain"].content
        bomb = make_chunk(b"iTXt", b"diffusers_workflow\0\1\0\0\0" + zlib.compress(bytes(2**27)))
        files = {
            "bomb": whole[:33] + bomb + whole[33:],
            "cut off": whole[:100],
            "changed": whole.replace(b"diffusers_workflow\0\1\0", b"diffusers_workflow\0\0\0"),
            "without one": encode(),
            "text": b"I am no workflow",
            "deep": b"[" * 100_000,
            "empty": b"",
            "half a zip": b"PK\x03\x04" + bytes(100),
            "another format": encode("BMP"),
        }
        outcomes = {name: refused(replay(demo_server, file)) for name, file in files.items()}
        assert outcomes == dict.fromkeys(files, (400, "workflow"))

    def test_too_much(self, demo_server, values, refused):
        long = values()
        long["unsupported"] = {str(number): "x" * 100 for number in range(20_000)}
        assert refused(demo_server.client.post("/replay", json=long)) == (400, "workflow")
        assert refused(replay(demo_server, bytes(60 * 2**20)))[0] == 400

    def test_nothing_of_it_stays_and_prompts_are_not_logged(self, demo_server, generated, values):
        again = replay(demo_server, generated["plain"].content)
        assert again.headers["x-workflow-match"] == "true"
        wrong = copy.deepcopy(values())
        wrong["arguments"] |= {"prompt": "my secret dream", "num_inference_steps": 10**6}
        demo_server.client.post("/replay", json=wrong)
        assert "secret dream" not in demo_server.log
        assert SECRET not in demo_server.log.partition("in a browser")[2]
        assert 'outcome="invalid",task="replay"' in demo_server.client.get("/metrics").text


def make_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


class TestModular:
    """The workflow of a modular pipeline is checked by the request of its modular workflow."""

    @pytest.fixture(scope="class")
    def kitchen(self):
        model = bentoml_diffusers.save_model(
            "replayed-modular", testing.tiny_modular_stable_diffusion_xl()
        )
        endpoints = find_endpoints(
            str(model.tag), ModelOptions(), RequestLimits(max_steps=4, default_steps=4)
        )
        requests = {endpoint.task: endpoint.request for endpoint in endpoints}
        with Engine.from_model(model, device="cpu") as engine:
            result = engine.run(
                "text2image", prompt="a", num_inference_steps=2, guidance_scale=3.0, height=32,
                width=32, seed=3, return_workflow=True,
            )  # fmt: skip
            yield engine, requests, Workflow.from_json(result.workflow.to_json())

    def test_same_image(self, kitchen):
        engine, requests, workflow = kitchen
        assert read_overrides(engine, requests, workflow, {}) == {}
        assert engine.replay(workflow, limits=RequestLimits(max_steps=4)).replay.matches

    def test_overrides(self, kitchen):
        changes = {"guidance_scale": 5, "num_inference_steps": 4}
        assert read_overrides(*kitchen, changes) == changes

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            (put("arguments.num_inference_steps", 5), "workflow.arguments.num_inference_steps"),
            (put("arguments.num_images_per_prompt", 4), "workflow.arguments.num_images_per_prompt"),
            (put("arguments.original_size", [10**6] * 2), "workflow.arguments.original_size"),
            (put("guider.config.guidance_scale", 1e5), "workflow.arguments.guidance_scale"),
            (put("task", "__call__"), "workflow.task"),
        ],
    )
    def test_limits(self, kitchen, change, field):
        engine, requests, workflow = kitchen
        values = json.loads(workflow.to_json())
        change(values)
        with pytest.raises(errors.InvalidWorkflow) as caught:
            read_overrides(engine, requests, Workflow.from_json(json.dumps(values)), {})
        assert caught.value.field.startswith(field)


def test_a_pipeline_that_generates_from_text_only():
    requests = {one.task: one.request for one in classic_endpoints(RequestLimits())}
    small = {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False}
    with Engine.from_model(testing.tiny_pixart_sigma()) as engine:
        result = engine.run(
            "txt2img", prompt="a", num_inference_steps=1, return_workflow=True, **small
        )
        values = json.loads(result.workflow.to_json())
        values["arguments"] |= {"use_resolution_binning": True, "clean_caption": True}
        workflow = Workflow.from_json(json.dumps(values))
        assert read_overrides(engine, requests, workflow, {"seed": 3}) == {"seed": 3}
        other = workflow.model_copy(update={"task": "inpaint"})
        with pytest.raises(errors.InvalidWorkflow, match=r"workflow\.task.* one of txt2img$"):
            read_overrides(engine, requests, other, {})
