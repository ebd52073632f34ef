"""API keys over HTTP: who is let in, to what, how often, and what is said to the others."""

import base64
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
from processes import SLOW

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
PIXELS = 32 * 32
LIMITS = {
    "alice": (),
    "bob": ("--task", "img2img"),
    "carol": ("--requests-per-minute", "2"),
    "dora": ("--pixel-steps-per-minute", str(10 * PIXELS)),
    "emil": ("--max-running", "1"),
    "ops": ("--task", "metrics"),
}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def run_key(run_command, make_home, key_file):
    home = make_home()

    def run(action, *words):
        return run_command("diffusers", "key", action, *words, "--file", str(key_file), home=home)

    return run


@pytest.fixture(scope="module")
def keys(run_key):
    return {name: run_key("add", name, *words).stdout.strip() for name, words in LIMITS.items()}


@pytest.fixture(scope="module")
def server(serve, tiny_home, keys, key_file):
    words = ("--keys", str(key_file), "--cors-origin", "https://page.example")
    command = ("diffusers", "serve")
    with serve("demo", *words, home=tiny_home, command=command) as running:
        yield running


@pytest.fixture(scope="module")
def ask(server, keys):
    """Asks for an image in the name of somebody."""

    def send(name=None, path="/txt2img", method="POST", headers=(), **fields):
        named = {} if name is None else {"authorization": f"Bearer {keys[name]}"}
        body = None if method != "POST" else {**CALL, **fields}
        return server.client.request(method, path, json=body, headers={**named, **dict(headers)})

    return send


def basic(user, password):
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"authorization": f"Basic {pair}"}


def test_file_holds_hashes_only_and_is_private(run_key, keys, key_file):
    text = key_file.read_text()
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert all(len(key) > 40 and key not in text for key in keys.values())
    listed = run_key("list", "--output", "json").stdout
    assert [one["name"] for one in json.loads(listed)] == list(LIMITS)
    assert "sha256" not in listed
    again = run_key("add", "alice")
    assert again.returncode == 1
    assert "remove that one first" in again.stderr


class TestWhoIsLetIn:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer \xe9\xff"},
            {"authorization": "Basic !"},
            {"authorization": "Digest a"},
            {"x-api-key": "wrong"},
        ],
        ids=repr,
    )
    def test_nobody_else(self, server, headers):
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answer = server.client.post("/txt2img", json=CALL, headers=raw)
        assert answer.status_code == 401
        assert answer.json()["detail"][0]["loc"] == ["authorization"]
        assert answer.headers["www-authenticate"].startswith("Bearer ")

    def test_a_key_in_the_query_is_none(self, server, keys):
        query = {"key": keys["alice"], "api_key": keys["alice"], "authorization": keys["alice"]}
        assert server.client.post("/txt2img", params=query, json=CALL).status_code == 401

    def test_bearer_and_basic(self, ask, server, keys):
        assert ask("alice").status_code == 200
        for user, status in (("alice", 200), ("", 200), ("bob", 401)):
            headers = basic(user, keys["alice"])
            answer = server.client.post("/txt2img", json=CALL, headers=headers)
            assert answer.status_code == status

    def test_in_the_form_of_the_dialect(self, server):
        answer = server.client.post("/v1/images/generations", json={"prompt": "a"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"

    @pytest.mark.parametrize("path", ["/", "/models/demo", "/replay", "/adapters", "/docs"])
    def test_whatever_is_posted_needs_one(self, server, path):
        assert server.client.post(path, json={"inputs": "a"}).status_code == 401

    @pytest.mark.parametrize("path", ["/capabilities", "/models", "/v1/models"])
    def test_what_is_read_needs_one(self, server, path):
        assert server.client.get(path).status_code == 401

    def test_before_the_body_is_read(self, server):
        """A body that never comes does not keep the answer."""
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(
                b"POST /txt2img HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: 40000000\r\n\r\n{"
            )
            assert b" 401 " in client.recv(100)

    @pytest.mark.parametrize("path", ["/livez", "/readyz", "/", "/docs", "/docs.json"])
    def test_open_paths(self, ask, path):
        assert ask(path=path, method="GET").status_code == 200

    def test_metrics_are_for_keys_that_name_them(self, ask):
        assert ask(path="/metrics", method="GET").status_code == 401
        assert ask("alice", path="/metrics", method="GET").status_code == 403
        assert ask("ops", path="/metrics", method="GET").status_code == 200

    def test_pages_of_a_site_that_may_ask(self, server, keys):
        origin = {"origin": "https://page.example"}
        wanted = {"access-control-request-method": "POST"}
        wanted["access-control-request-headers"] = "authorization,content-type"
        question = server.client.options("/txt2img", headers={**origin, **wanted})
        assert question.status_code == 200
        assert question.headers["access-control-allow-origin"] == "https://page.example"
        site = {**origin, "sec-fetch-site": "cross-site"}
        refused = server.client.post("/txt2img", json=CALL, headers=site)
        assert refused.status_code == 401
        assert "access-control-allow-origin" in refused.headers  # so that the page can read it
        named = {**site, "authorization": f"Bearer {keys['alice']}"}
        assert (
            "x-seed"
            in server.client.post("/txt2img", json=CALL, headers=named).headers[
                "access-control-expose-headers"
            ]
        )
        other = {**named, "origin": "https://evil.example"}
        assert server.client.post("/txt2img", json=CALL, headers=other).status_code == 403


class TestHowMuch:
    def test_other_tasks(self, ask):
        answer = ask("bob")
        assert answer.status_code == 403
        assert "'bob' may not ask for 'txt2img'" in answer.json()["error"]

    def test_requests_per_minute(self, ask):
        assert [ask("carol", seed=seed).status_code for seed in (1, 2)] == [200, 200]
        answer = ask("carol")
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert "requests_per_minute=2" in answer.json()["error"]

    def test_a_wrong_request_costs_nothing(self, ask, server):
        for _ in range(12):
            assert ask("dora", height=63).status_code == 400

    def test_pixel_steps_per_minute(self, ask):
        assert ask("dora", num_inference_steps=11).status_code == 403  # never
        assert ask("dora", num_inference_steps=8).status_code == 200
        answer = ask("dora", num_inference_steps=9)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 42
        assert ask("dora", num_inference_steps=1).status_code == 200

    def test_several_images_are_one_request(self, server, keys):
        headers = {"authorization": f"Bearer {keys['emil']}"}
        body = {"prompt": "a", "n": 3, "size": "32x32", "num_inference_steps": 1}
        answer = server.client.post("/v1/images/generations", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 3

    def test_at_once(self, ask, server, keys):
        with httpx.Client(base_url=server.url) as client:
            headers = {"authorization": f"Bearer {keys['emil']}"}
            leaving = threading.Thread(target=lambda: _ask_and_leave(client, headers), daemon=True)
            leaving.start()
            statuses = set()
            give_up = time.monotonic() + 60
            while 429 not in statuses:
                answer = ask("emil")
                statuses.add(answer.status_code)
                assert time.monotonic() < give_up
            assert int(answer.headers["retry-after"]) >= 1
            assert ask("alice").status_code == 200
            leaving.join()
        while ask("emil").status_code != 200:  # the place is free when the request has ended
            assert time.monotonic() < give_up

    def test_is_counted_by_name(self, ask):
        text = ask("ops", path="/metrics", method="GET").text
        assert 'diffusers_key_calls_total{key="bob",status="403"}' in text
        assert 'diffusers_key_calls_total{key="carol",status="429"}' in text
        work = 'diffusers_key_pixel_steps_total{key="carol"} '
        assert float(text.partition(work)[2].split()[0]) == 2 * 2 * PIXELS


def _ask_and_leave(client, headers):
    """Has a long request run for a while; one of the others may hold the place at first."""
    with contextlib.suppress(httpx.ReadTimeout):
        while client.post("/txt2img", json=SLOW, headers=headers, timeout=2).status_code == 429:
            pass


def test_keys_come_and_go_while_it_runs(server, run_key, ask, keys):
    keys["new"] = run_key("add", "new").stdout.strip()
    assert ask("new").status_code == 200
    assert run_key("remove", "new").returncode == 0
    assert ask("new").status_code == 401
    assert ask("alice").status_code == 200


def test_says_where_it_listens(server):
    assert "answers whoever has a key" in server.log
