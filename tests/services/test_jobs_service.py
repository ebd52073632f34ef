"""Jobs over HTTP, in the API of Replicate: taken, waited for, watched, cancelled, kept."""

import base64
import json
import re
import subprocess
import time

import pytest
from processes import BENTOML, ENDLESS, ROOT, start_server

pytestmark = pytest.mark.slow

CALL = {"prompt": "a red circle", "num_inference_steps": 4, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def start(environment, tiny_home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")

    def start(log):
        known = {**environment(tiny_home), "JOBS_FOLDER": str(folder)}
        words = ["serve", "jobs_service:svc"]
        return start_server(words, ROOT / "tests" / "services", known, folder / log)

    return start


@pytest.fixture(scope="module")
def server(start):
    with start("first.log") as running:
        yield running


def post(server, body, status=201, path="/v1/predictions", **headers):
    answer = server.client.post(path, json=body, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


def wait_for(server, job, *statuses, within_s=60):
    give_up = time.monotonic() + within_s
    while (job := server.client.get(job["urls"]["get"]).json())["status"] not in statuses:
        assert time.monotonic() < give_up, job
        time.sleep(0.02)
    return job


def test_a_job_is_taken_and_its_image_is_that_of_a_request(server, open_image):
    job = post(server, {"input": {**CALL, "seed": 7}})
    assert job["status"] in ("starting", "processing")
    done = wait_for(server, job, "succeeded")
    (address,) = done["output"]
    image = open_image(server.client.get(address).content)
    lone = open_image(server.generate(**CALL, seed=7))
    assert image.tobytes() == lone.tobytes()
    assert done["seeds"] == [7]
    assert re.fullmatch(r"100%\|#{10}\| 4/4\n", done["logs"])
    assert done["metrics"]["predict_time"] > 0


def test_prefer_wait_answers_with_the_images(server, open_image):
    wish = {**CALL, "num_outputs": 2, "output_format": "webp", "seed": 4}
    job = post(server, {"input": wish}, prefer="wait")
    assert job["status"] == "succeeded"
    assert job["input"] == wish
    assert job["seeds"] == [4, 5]
    first, second = (open_image(server.client.get(one).content) for one in job["output"])
    assert first.format == second.format == "WEBP"
    assert first.tobytes() != second.tobytes()


def test_a_wait_that_is_too_short_leaves_a_client_of_replicate_waiting(server):
    long = post(server, {"input": {**ENDLESS, "num_inference_steps": 150}}, prefer="wait=1")
    assert long["status"] == "starting"
    server.client.post(long["urls"]["cancel"])
    wait_for(server, long, "canceled")


def test_an_image_can_come_as_a_data_url(server, encode):
    url = f"data:image/png;base64,{base64.b64encode(encode(size=(64, 64))).decode()}"
    wish = {"prompt": "a red circle", "num_inference_steps": 4, "image": url}
    job = post(server, {"input": {**wish, "prompt_strength": 0.6}}, prefer="wait")
    assert job["status"] == "succeeded", job


def test_an_id_of_ones_own_is_one_job(server):
    wish = {"input": CALL}
    answers = [server.client.put("/v1/predictions/mine", json=wish) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {201}
    first, second = (answer.json() for answer in answers)
    assert first["id"] == second["id"] == "mine"
    other = server.client.put("/v1/predictions/mine", json={"input": {**CALL, "seed": 1}})
    assert other.status_code == 409
    assert other.headers["content-type"] == "application/problem+json"
    assert wait_for(server, first, "succeeded")["created_at"] == first["created_at"]


def test_cancel_frees_the_device(server):
    job = post(server, {"input": {**ENDLESS, "num_inference_steps": 150}})
    wait_for(server, job, "processing")
    cancelled = server.client.post(job["urls"]["cancel"])
    assert cancelled.status_code == 200
    assert wait_for(server, job, "canceled")["output"] is None
    server.generate()


def test_a_stream_tells_each_step(server):
    job = post(server, {"input": {**CALL, "num_inference_steps": 20}, "stream": True})
    text = server.client.get(job["urls"]["stream"]).text
    events = re.findall(r"^event: (\w+)$", text, re.MULTILINE)
    assert events[-2:] == ["output", "done"]
    assert "logs" in events


def test_lists_have_the_latest_first(server):
    job = post(server, {"input": CALL}, prefer="wait")
    listed = server.client.get("/v1/predictions").json()
    assert listed["results"][0]["id"] == job["id"]
    assert listed["next"] is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "input"),
        ({"input": {**CALL, "num_outputs": 0}}, "num_outputs"),
        ({"input": {**CALL, "steps": 4}}, "steps"),
        ({"input": {**CALL, "output_format": "pdf"}}, "output_format"),
        ({"input": CALL, "webhook": "https://example.org"}, "webhook"),
        ({"input": {**CALL, "lora_weights": "none-such"}}, "none-such"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_taken(server, body, text):
    before = len(server.client.get("/v1/predictions").json()["results"])
    answer = server.client.post("/v1/predictions", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert text in answer.json()["detail"]
    assert len(server.client.get("/v1/predictions").json()["results"]) == before


def test_nobody_reads_an_image_without_its_address(server):
    job = post(server, {"input": CALL}, prefer="wait")
    (address,) = job["output"]
    assert server.client.get(address).status_code == 200
    assert server.client.get(address.partition("?")[0]).status_code == 404
    assert server.client.get("/v1/predictions/none").status_code == 404


def run_command(server, *words):
    command = [BENTOML, "diffusers", "jobs", *words, "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_line_shows_jobs(server):
    job = post(server, {"input": CALL})
    waited = run_command(server, "wait", job["id"])
    assert (waited.returncode, waited.stderr) == (0, "")
    assert server.client.get(waited.stdout.strip()).status_code == 200
    listed = json.loads(run_command(server, "list", "--output", "json").stdout)
    assert listed[0]["id"] == job["id"]
    unknown = run_command(server, "show", "none")
    assert unknown.returncode == 1
    assert "no job 'none'" in unknown.stderr


def test_jobs_go_on_after_a_restart(start):
    with start("killed.log") as server:
        jobs = [post(server, {"input": {**CALL, "seed": seed}}) for seed in range(6)]
        long = post(server, {"input": {**CALL, "num_inference_steps": 60, "seed": 9}})
    with start("again.log") as server:
        path = "/v1/predictions/{}"
        for seed, job in enumerate(jobs):
            again = {"urls": {"get": path.format(job["id"])}}
            assert wait_for(server, again, "succeeded")["seeds"] == [seed]
        done = wait_for(server, {"urls": {"get": path.format(long["id"])}}, "succeeded")
        assert json.dumps(done["seeds"]) == "[9]"
