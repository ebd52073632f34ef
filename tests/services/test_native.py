"""What the native API answers beside one image: several, JSON, events, what it can, documents."""

import base64
import io
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.parser import BytesParser

import pytest
from comparing import same_image
from openapi_spec_validator import validate
from PIL import Image

from bentoml_diffusers.serving.answers import choose_form

BODY = {"prompt": "a big red circle", "num_inference_steps": 3, "seed": 7}
LONG = {"prompt": "a", "num_inference_steps": 150, "height": 256, "width": 256}
EVENTS = {"accept": "text/event-stream"}


@pytest.fixture(scope="module")
def post(demo_server):
    def send(path="/txt2img", accept="*/*", status=200, headers=(), **fields):
        body = {**BODY, **fields}
        named = {"accept": accept, **dict(headers)}
        answer = demo_server.client.post(path, json=body, headers=named)
        assert answer.status_code == status, answer.text
        return answer

    return send


@pytest.fixture(scope="module")
def lone(post):
    """The images of the seeds 7 and 8."""
    return [open_image(post(seed=seed).content) for seed in (7, 8)]


def open_image(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def read_events(lines):
    """Yields the name and the data of each event."""
    name = ""
    for line in lines:
        kind, _, text = line.partition(": ")
        if kind == "event":
            name = text
        elif kind == "data":
            yield name, json.loads(text)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "file"),
        ("*/*", "file"),
        ("image/png", "file"),
        ("application/json, text/plain, */*", "file"),  # axios, which wants what there is
        ("application/json", "json"),
        ("application/json;q=0.9, image/*;q=0.8", "json"),
        ("image/webp, application/json;q=0.5", "file"),
        ("text/event-stream", "events"),
        ("Multipart/Mixed", "multipart"),
        ("application/zip;q=x", "zip"),
        ("application/json;q=0", "file"),
        ("text/html", "file"),
    ],
)
def test_form_of_the_answer(accept, form):
    assert choose_form(accept) == form


class TestSeveralImages:
    def check(self, images, lone):
        assert len(images) == 2
        for got, expected in zip(images, lone, strict=True):
            assert same_image(got, expected)

    def test_zip(self, post, lone):
        answer = post(n=2)
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["x-seed"] == "7, 8"
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        *names, told = archive.namelist()
        assert (names[0], told) == ("image-1-seed-7.png", "answer.json")
        said = json.loads(archive.read(told))
        assert [image["file"] for image in said["images"]] == names
        assert said["steps"] == 3
        self.check([open_image(archive.read(name)) for name in names], lone)

    def test_parts(self, post, lone):
        answer = post(n=2, accept="multipart/mixed")
        head = f"content-type: {answer.headers['content-type']}\r\n\r\n".encode()
        parts = BytesParser().parsebytes(head + answer.content).get_payload()
        assert [part["x-seed"] for part in parts] == ["7", "8"]
        self.check([open_image(part.get_payload(decode=True)) for part in parts], lone)

    def test_json(self, demo_server, post, lone):
        answer = post(n=2, accept="application/json", output_format="png").json()
        assert [image["seed"] for image in answer["images"]] == [7, 8]
        files = [base64.b64decode(image["data"]) for image in answer["images"]]
        self.check([open_image(file) for file in files], lone)
        assert sum(answer["batches"].values()) > 6
        again = demo_server.client.post("/replay", files={"workflow": files[1]})
        assert again.headers["x-seed"] == "8"  # each has its own workflow

    def test_one_as_json(self, post):
        answer = post(accept="application/json", prompt="a (red:1.2) circle")
        body = answer.json()
        assert body["request_id"] == answer.headers["x-request-id"]
        assert body["warnings"] == json.loads(answer.headers["x-warnings"])
        assert body["scheduler"].endswith("Scheduler")

    def test_too_many(self, post):
        detail = post(n=11, status=400).json()["detail"]
        assert detail[0]["loc"] == ["n"]


class TestEvents:
    def collect(self, demo_server, **fields):
        body = {**BODY, **fields}
        with demo_server.client.stream("POST", "/txt2img", json=body, headers=EVENTS) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            return list(read_events(answer.iter_lines()))

    def test_in_order(self, demo_server, lone):
        events = self.collect(demo_server)
        assert [name for name, _ in events] == [
            "queued",
            *["progress"] * 3,
            "image",
            "done",
        ]
        assert [(data["step"], data["of"]) for _, data in events[1:4]] == [(1, 3), (2, 3), (3, 3)]
        assert same_image(open_image(base64.b64decode(events[4][1]["data"])), lone[0])
        assert events[-1][1]["steps"] == 3

    def test_previews_only_where_asked(self, demo_server, lone):
        events = self.collect(demo_server, previews=True, num_inference_steps=8)
        previews = [data for name, data in events if name == "preview"]
        assert previews
        image = open_image(base64.b64decode(previews[0]["data"]))
        assert (image.format, image.size) == ("JPEG", lone[0].size)

    def test_refused_before_it_begins(self, post):
        answer = post(accept="text/event-stream", status=404, lora_weights="outlin")
        assert "did you mean 'outline'" in answer.json()["error"]

    def test_a_client_that_goes_away_stops_it(self, demo_server):
        stream = demo_server.client.stream("POST", "/txt2img", json=LONG, headers=EVENTS)
        with stream as answer:
            events = read_events(answer.iter_lines())
            assert next(name for name, _ in events if name != "queued") == "progress"
        demo_server.wait_for_metric(r'outcome="cancelled",task="txt2img"\} [1-9]')
        demo_server.wait_for_metric(r'request_in_progress\{endpoint="/txt2img".*\} 0')


class TestCancel:
    def test_own_request_by_its_id(self, demo_server):
        headers = {**EVENTS, "x-request-id": "mine:1"}
        stream = demo_server.client.stream("POST", "/txt2img", json=LONG, headers=headers)
        with stream as answer:
            assert answer.headers["x-request-id"] == "mine:1"
            events = read_events(answer.iter_lines())
            assert next(events)[0] == "queued"
            cancelled = demo_server.client.post("/requests/mine:1/cancel")
            assert cancelled.json() == {"request_id": "mine:1", "cancelled": True}
            name, data = list(events)[-1]
        assert (name, data["status"]) == ("error", 503)
        assert demo_server.client.post("/requests/mine:1/cancel").status_code == 404

    def test_a_request_that_is_no_stream(self, demo_server):
        with ThreadPoolExecutor() as pool:
            headers = {"x-request-id": "mine-2"}
            running = pool.submit(demo_server.client.post, "/txt2img", json=LONG, headers=headers)
            while demo_server.client.post("/requests/mine-2/cancel").status_code == 404:
                assert not running.done()
            assert running.result().status_code == 503

    @pytest.mark.parametrize("name", ["", "two words", "x" * 129, "é"])
    def test_other_ids_are_replaced(self, post, name):
        answer = post(headers={"x-request-id": name.encode()})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_errors_have_one(self, demo_server):
        assert demo_server.client.get("/txt2img").headers["x-request-id"]


class TestDescriptions:
    @pytest.fixture(scope="class")
    def document(self, demo_server):
        return demo_server.client.get("/docs.json").json()

    def test_capabilities(self, demo_server, post):
        found = demo_server.client.get("/capabilities").json()
        assert set(found["tasks"]) == {"txt2img", "img2img", "inpaint"}
        field = found["tasks"]["txt2img"]["fields"]["num_inference_steps"]
        assert (field["minimum"], field["maximum"], field["default"]) == (1, 150, 50)
        assert found["adapters"]["lora_weights"] == ["outline", "stripes"]
        assert found["limits"]["max_images"] == 10
        assert found["dialects"]["native"]["/txt2img"]["applied"]
        assert {"DDIMScheduler", "Euler a", "DPM++ 2M Karras"} <= set(found["schedulers"])
        for scheduler in found["schedulers"][::9]:
            post(scheduler=scheduler, num_inference_steps=6)

    def test_models(self, demo_server):
        (model,) = demo_server.client.get("/models").json()["models"]
        assert model["id"].startswith("demo:")
        assert model["pipeline_class"] == "StableDiffusionPipeline"

    def test_the_document_is_valid(self, document):
        validate(document)
        text = json.dumps(document)
        assert '"file"' not in text
        assert "$defs" not in text

    def test_its_examples_are_answered(self, demo_server, document):
        body = document["paths"]["/txt2img"]["post"]["requestBody"]["content"]
        first, media_type = next(iter(body.items())), "application/json"
        assert first[0] == media_type
        assert len(body[media_type]["example"]["prompt"]) > 1
        small = {"num_inference_steps": 1}
        sent = {**body[media_type]["example"], **small}
        assert demo_server.client.post("/txt2img", json=sent).status_code == 200

    def test_statuses_and_types_of_each_path(self, document):
        answers = document["paths"]["/txt2img"]["post"]["responses"]
        assert {"400", "404", "405", "415", "429", "503", "504"} <= set(answers)
        assert "409" in document["paths"]["/replay"]["post"]["responses"]
        assert set(answers["200"]["content"]) == {
            *("image/png", "image/jpeg", "image/webp"),
            *("application/zip", "multipart/mixed", "application/json", "text/event-stream"),
        }
        assert "retry-after" in answers["429"]["headers"]

    def test_answers_are_as_it_says(self, document, post):
        schemas = document["components"]["schemas"]
        answer = post(accept="application/json").json()
        assert set(answer) == set(schemas["Answer"]["properties"]) - {"videos", "audios"}
        image = schemas["Answer"]["properties"]["images"]["items"]
        assert set(image["required"]) < set(answer["images"][0]) < set(image["properties"])
        error = post(status=400, n=0).json()
        assert set(error) == set(schemas["Error"]["properties"])

    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_the_page_loads_nothing_from_elsewhere(self, demo_server, path):
        answer = demo_server.client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        links = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        assert len(links) == 4
        assert all(link.startswith(("./docs/", "data:,")) for link in links)
        for link in links[:1] + links[2:]:
            assert demo_server.client.get(link.removeprefix(".")).status_code == 200


def test_a_client_made_from_the_document(demo_server, tmp_path):
    """By `openapi-python-client`, in a process that imports it."""
    pytest.importorskip("openapi_python_client")
    (tmp_path / "document.json").write_text(demo_server.client.get("/docs.json").text)
    generate = [sys.executable, "-m", "openapi_python_client", "generate"]
    where = ["--path", "document.json", "--output-path", "client", "--meta", "none"]
    subprocess.run([*generate, *where], cwd=tmp_path, check=True, capture_output=True)
    script = f"""
import base64, io, json
from client import Client
from client.api.generation import img2img, txt2img
from client.api.service import models
from client.models import Img2ImgForm, Txt2Img
from client.types import File
with Client("{demo_server.url}", headers={{"accept": "application/json"}}) as client:
    body = Txt2Img(prompt="a red circle", num_inference_steps=2, seed=1, n=2)
    first = txt2img.sync(client=client, body=body)
    image = io.BytesIO(base64.b64decode(first.images[1].data))
    form = Img2ImgForm(
        prompt="a blue star", image=File(image, "a.png", "image/png"), num_inference_steps=4
    )
    second = img2img.sync(client=client, body=form)
    wrong = txt2img.sync(client=client, body=Txt2Img(prompt=""))
    listed = models.sync(client=client)
print(json.dumps([
    first.images[1].seed, second.images[0].width, wrong.detail[0].loc, listed.models[0].id
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seed, width, place, model = json.loads(done.stdout)
    assert (seed, width, place) == (2, 64, ["prompt"])
    assert model.startswith("demo:")
