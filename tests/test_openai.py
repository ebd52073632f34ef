"""OpenAI's images API and Hugging Face's, as their clients write requests and read answers."""

import asyncio
import base64
import io
import json

import pytest
from PIL import Image
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from bentoml_diffusers import Engine, ModelOptions, OpenAIOptions, RequestLimits, testing
from bentoml_diffusers.errors import QueueFull
from bentoml_diffusers.options import EngineLimits
from bentoml_diffusers.serving.calls import Call, Previews
from bentoml_diffusers.serving.dialects import DialectContext, choose_dialects, make_app
from bentoml_diffusers.serving.dialects.names import ServedModel
from bentoml_diffusers.serving.dialects.openai.errors import error_headers
from bentoml_diffusers.serving.dialects.openai.fields import ImageRequest
from bentoml_diffusers.serving.dialects.openai.orders import Order
from bentoml_diffusers.serving.dialects.openai.streams import answer_stream
from bentoml_diffusers.serving.dispatcher import Dispatcher
from bentoml_diffusers.serving.endpoints import classic_endpoints
from bentoml_diffusers.serving.uploads import UploadBudget

LIMITS = RequestLimits(default_steps=8, max_steps=1000, max_side=256, max_images=4)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def engine(lora_dir):
    options = ModelOptions(lora_dir=str(lora_dir))
    with Engine(testing.tiny_stable_diffusion(), options) as running:
        yield running


def make_client(engine):
    endpoints = classic_endpoints(LIMITS)
    context = DialectContext(
        name="test",
        model="demo",
        endpoints=endpoints,
        limits=LIMITS,
        uploads=UploadBudget(LIMITS.max_open_upload_bytes),
        dialects=choose_dialects(("openai", "huggingface")),
        openai=OpenAIOptions(quality_steps={"low": 2}, model_aliases={"gpt-image-1": "demo"}),
    )
    served = ServedModel("demo", "v1", 7, context.openai.model_aliases)
    context._loaded[:] = [(Dispatcher(engine, context.requests), served)]
    return TestClient(make_app(context))


@pytest.fixture(scope="module")
def client(engine):
    return make_client(engine)


@pytest.fixture
def generate(client):
    """Posts JSON; returns the answer and its first image."""

    def post(path=GENERATIONS, **fields):
        answer = client.post(path, json={**PROMPT, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json(), open_text(answer.json()["data"][0]["b64_json"])

    return post


@pytest.fixture
def edit(client):
    """Posts a form; returns its first image."""

    def post(files, path=EDITS, **fields):
        data = {name: str(value) for name, value in {**PROMPT, **fields}.items()}
        answer = client.post(path, data=data, files=files)
        assert answer.status_code == 200, answer.text
        return open_text(answer.json()["data"][0]["b64_json"])

    return post


@pytest.fixture(scope="module")
def photo():
    return Image.radial_gradient("L").resize((64, 32)).convert("RGB")


@pytest.fixture(scope="module")
def mask():
    left = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    left.paste((0, 0, 0, 0), (0, 0, 32, 32))
    return left


def encode(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def open_text(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def count_outcomes(outcome):
    labels = {"task": "txt2img", "outcome": outcome}
    return REGISTRY.get_sample_value("diffusers_requests_total", labels) or 0


def read_events(answer):
    """Events as the official clients read them."""
    blocks = [block for block in answer.text.split("\n\n") if block.startswith("event: ")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


class TestGenerations:
    def test_the_image_is_that_of_the_engine(self, engine, generate):
        body, image = generate(size="64x32", user="me")
        lone = engine.run("txt2img", **PROMPT, width=64, height=32).images[0]
        assert image.tobytes() == lone.tobytes()
        assert body["data"][0]["seed"] == 5
        assert {body[name] for name in ("size", "output_format", "background", "quality")} == {
            "64x32",
            "png",
            "opaque",
            "auto",
        }
        assert body["usage"]["total_tokens"] == 0

    def test_several_images_have_a_seed_each(self, generate):
        body, _ = generate(n=3)
        assert [one["seed"] for one in body["data"]] == [5, 6, 7]
        assert len({one["b64_json"] for one in body["data"]}) == 3

    def test_compression_makes_a_smaller_file(self, generate):
        sizes = [
            len(generate(output_format="webp", output_compression=n)[0]["data"][0]["b64_json"])
            for n in (5, 100)
        ]
        assert sizes[0] < sizes[1]

    def test_nulls_say_nothing(self, generate):
        body, _ = generate(size=None, n=None, quality=None, style=None, response_format="b64_json")
        assert body["size"] == "32x32"


class TestModels:
    def test_loras_are_listed_as_models(self, client):
        entries = client.get("/v1/models").json()["data"]
        names = {entry["id"] for entry in entries}
        assert {"demo", "demo:one.safetensors", "gpt-image-1"} <= names
        assert {entry["object"] for entry in entries} == {"model"}

    @pytest.mark.parametrize("name", ["demo", "demo:one.safetensors+two.safetensors"])
    def test_a_model_by_name(self, client, name):
        assert client.get(f"/v1/models/{name}").json()["id"] == name

    @pytest.mark.parametrize("name", ["other", "demo:nothing"])
    def test_a_model_that_is_not_there(self, client, name):
        answer = client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    def test_a_name_a_field_a_form_and_json_text_mean_the_same_lora(
        self, engine, generate, edit, photo
    ):
        lora = {"lora_weights": [{"name": "one.safetensors"}]}
        lone = engine.run("txt2img", **PROMPT, **lora).images[0].tobytes()
        assert generate(model="demo:one.safetensors")[1].tobytes() == lone
        assert generate(**lora)[1].tobytes() == lone
        assert generate()[1].tobytes() != lone

        files = {"image": encode(photo)}
        forms = [
            {"model": "demo:one.safetensors"},
            {"lora_weights[][name]": "one.safetensors", "lora_weights[][scale]": 1},
            {"lora_weights": json.dumps(lora["lora_weights"])},
        ]
        assert len({edit(files, **form).tobytes() for form in forms}) == 1


class TestEdits:
    @pytest.mark.parametrize("name", ["image", "image[]"])
    def test_without_a_mask_it_is_img2img(self, engine, edit, photo, name):
        image = edit({name: encode(photo)}, strength=0.6)
        lone = engine.run("img2img", **PROMPT, image=photo, strength=0.6, keep_size=True)
        assert image.tobytes() == lone.images[0].tobytes()

    def test_transparent_parts_of_the_mask_are_generated(self, engine, edit, photo, mask):
        image = edit({"image": encode(photo), "mask": encode(mask)})
        white = Image.new("L", (64, 32))
        white.paste(255, (0, 0, 32, 32))
        lone = engine.run("inpaint", **PROMPT, image=photo, mask_image=white, keep_size=True)
        assert image.tobytes() == lone.images[0].tobytes()

    def test_a_variation_needs_no_prompt(self, client, engine, photo):
        data = {"seed": "5", "num_inference_steps": "4", "size": "32x32"}
        answer = client.post("/v1/images/variations", data=data, files={"image": encode(photo)})
        assert answer.status_code == 200, answer.text
        assert open_text(answer.json()["data"][0]["b64_json"]).size == (32, 32)


class TestStreams:
    def test_partial_images_come_before_the_final_one(self, client, generate):
        body = {**PROMPT, "num_inference_steps": 8, "stream": True, "partial_images": 3}
        events = read_events(client.post(GENERATIONS, json=body))
        assert [event["type"].partition(".")[2] for event in events] == [
            *["partial_image"] * 3,
            "completed",
        ]
        assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
        assert events[-1]["usage"]["input_tokens_details"] == {"image_tokens": 0, "text_tokens": 0}
        assert len({event["b64_json"] for event in events}) == 4
        final = generate(num_inference_steps=8)[1]
        assert open_text(events[-1]["b64_json"]).tobytes() == final.tobytes()
        assert {open_text(event["b64_json"]).size for event in events} == {final.size}

    def test_without_partial_images_there_is_the_final_event(self, client):
        events = read_events(client.post(GENERATIONS, json={**PROMPT, "stream": True, "n": 2}))
        assert [event["type"] for event in events] == ["image_generation.completed"] * 2
        assert {event["seed"] for event in events} == {5, 6}

    def test_events_of_an_edit(self, client, photo):
        data = {**PROMPT, "stream": "true", "partial_images": "1"}
        events = read_events(client.post(EDITS, data=data, files={"image": encode(photo)}))
        assert [event["type"] for event in events] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]

    def test_what_is_refused_at_once_has_a_status(self, client):
        answer = client.post(GENERATIONS, json={**PROMPT, "stream": True, "scheduler": "none"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "scheduler")

    def test_what_fails_later_ends_with_an_error(self):
        limits = EngineLimits(timeout_s=1.5)
        with Engine(testing.tiny_stable_diffusion(), limits=limits) as engine:
            body = {**PROMPT, "num_inference_steps": 900, "size": "256x256", "stream": True}
            *_, last = read_events(make_client(engine).post(GENERATIONS, json=body))
        assert (last["type"], last["error"]["code"]) == ("error", "timeout")

    def test_a_client_that_goes_away_cancels_it(self, engine):
        requests = {one.task: one.request for one in classic_endpoints(LIMITS)}
        call = Call(
            task="txt2img",
            arguments={**PROMPT, "num_inference_steps": 900},
            previews=Previews(count=1, interval_s=0),
        )
        order = Order(task="txt2img", values={}, request=ImageRequest(partial_images=1))
        sent = []

        async def read_one_event():
            gone = asyncio.Event()

            async def receive():
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message.get("body", b""))
                if b"partial_image" in sent[-1]:
                    gone.set()

            dispatcher = Dispatcher(engine, requests)
            response = await answer_stream(dispatcher, call, order, receive)
            await response({}, receive, send)

        before = count_outcomes("cancelled")
        asyncio.run(read_one_event())
        assert b"".join(sent).count(b"event: ") == 2
        assert b'"code": "cancelled"' in sent[-2]
        assert count_outcomes("cancelled") == before + 1


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "status", "code", "param"),
        [
            ({"prompt": None}, 400, "missing_required_parameter", "prompt"),
            ({"prompt": " "}, 400, "invalid_value", "prompt"),
            ({"steps": 3}, 400, "unknown_parameter", "steps"),
            ({"size": "60x32"}, 400, "invalid_value", "size"),
            ({"size": "512x32"}, 400, "invalid_value", "size"),
            ({"num_inference_steps": 1001}, 400, "invalid_value", "num_inference_steps"),
            ({"n": "many"}, 400, "invalid_value", "n"),
            ({"n": 5}, 400, "invalid_value", "n"),  # the service has less than OpenAI
            ({"previews": True}, 400, "unsupported_parameter", "previews"),
            ({"background": "transparent"}, 400, "unsupported_value", "background"),
            ({"frame_count": 3}, 400, "unsupported_parameter", "frame_count"),
            ({"model": "dall-e-2"}, 404, "model_not_found", "model"),
            ({"model": "demo:nothing"}, 404, "adapter_not_found", "model"),
            ({"lora_weights": [{"name": "x"}]}, 404, "adapter_not_found", "lora_weights"),
            ({"lora_weights": [{"name": ""}]}, 400, "invalid_value", "lora_weights[0].name"),
        ],
    )
    def test_they_name_code_and_field(self, client, fields, status, code, param):
        answer = client.post(GENERATIONS, json={**PROMPT, **fields})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{param}: ")
        assert answer.headers["x-should-retry"] == "false"

    def test_a_form_without_an_image(self, client):
        answer = client.post(EDITS, data=PROMPT)
        assert answer.json()["error"]["param"] == "image"

    def test_a_name_that_is_no_text(self, client):
        body, headers = rb'{"prompt": "x", "\ud800": 1}', {"content-type": "application/json"}
        answer = client.post(GENERATIONS, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")

    def test_a_body_of_another_type(self, client):
        answer = client.post(EDITS, json=PROMPT)
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")

    def test_when_to_come_again(self):
        assert error_headers(QueueFull(3, 2)) == {"retry-after": "2", "retry-after-ms": "2000"}


class TestHuggingFace:
    def test_text_to_image(self, client, engine):
        parameters = {"seed": 5, "num_inference_steps": 4, "width": 64, "height": 32}
        body = {"inputs": "a red circle", "parameters": parameters}
        for path in ("/", "/models/demo"):
            answer = client.post(path, json=body, headers={"accept": "image/png"})
            assert answer.headers["content-type"] == "image/png", answer.text
            lone = engine.run("txt2img", prompt="a red circle", **parameters)
            assert Image.open(io.BytesIO(answer.content)).tobytes() == lone.images[0].tobytes()

    def test_image_to_image(self, client, photo):
        size = {"width": 32, "height": 32}
        body = {
            "inputs": base64.b64encode(encode(photo)).decode(),
            "parameters": {"prompt": "a red circle", "target_size": size},
        }
        headers = {"accept": "image/webp, */*"}
        answer = client.post("/models/demo:one.safetensors", json=body, headers=headers)
        image = Image.open(io.BytesIO(answer.content))
        assert (image.format, image.size) == ("WEBP", (32, 32))

    @pytest.mark.parametrize(
        ("path", "body", "status", "field"),
        [
            ("/models/other", {"inputs": "a"}, 404, "model"),
            ("/", {"parameters": {}}, 400, "inputs"),
            ("/", {"inputs": "a", "more": 1}, 400, "more"),
            ("/", {"inputs": "a", "parameters": {"steps": 1}}, 400, "steps"),
            ("/", {"inputs": "a", "parameters": {"prompt": "b"}}, 400, "inputs"),
            ("/", {"inputs": "a", "parameters": {"n": 2}}, 400, "parameters.n"),
            ("/", {"inputs": "iVBORw0KGgo", "parameters": {}}, 400, "parameters.prompt"),
        ],
    )
    def test_errors(self, client, path, body, status, field):
        answer = client.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert field in answer.json()["error"]
