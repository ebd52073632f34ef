"""Who may ask a service, in which form, and what is said to whom it refuses."""

import contextlib
import io
import json
import socket
import time
import zlib

import pytest

BODY = json.dumps({"prompt": "a red circle", "num_inference_steps": 2}).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def post(demo_server):
    def send(path="/txt2img", content=BODY, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return demo_server.client.post(path, content=content, headers={**JSON, **named})

    return send


class TestMediaTypes:
    @pytest.mark.parametrize("path", ["/txt2img", "/img2img", "/inpaint", "/replay", "/adapters"])
    @pytest.mark.parametrize(
        "media_type", ["text/plain", "text/plain; application/json", "image/png"]
    )
    def test_others_are_refused_without_a_traceback(self, demo_server, post, path, media_type):
        before = len(demo_server.log)
        answer = post(path, content_type=media_type)
        assert answer.status_code == 415
        assert answer.json()["detail"][0]["loc"] == ["content-type"]
        assert "Traceback" not in demo_server.log[before:]

    def test_a_body_without_a_type(self, demo_server):
        assert demo_server.client.post("/txt2img", content=BODY).status_code == 415
        assert demo_server.client.post("/adapters").status_code == 200

    @pytest.mark.parametrize("path", ["/txt2img", "/replay", "/adapters"])
    @pytest.mark.parametrize("body", [BODY, b'{"prompt": "a = b & c"}', b' [{"a": 1}]'])
    def test_json_that_curl_sends_as_a_form(self, demo_server, path, body):
        """`curl -d` says so where nobody says another type."""
        form = {"content-type": "application/x-www-form-urlencoded"}
        answer = demo_server.client.post(path, content=body, headers=form)
        assert answer.status_code == 400
        assert "-H 'content-type: application/json'" in answer.json()["error"]

    @pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
    def test_json_by_other_spellings(self, post, media_type):
        assert post(content_type=media_type).status_code == 200


class TestHosts:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:3000", "127.0.0.1.evil.example", "localhost.evil"]
    )
    def test_no_other_name_reaches_a_loopback_address(self, demo_server, post, host):
        assert post(host=host).status_code == 403
        assert demo_server.client.get("/docs.json", headers={"host": host}).status_code == 403

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.2:1", "[::1]:3000"])
    def test_its_own_names_do(self, post, host):
        assert post(host=host).status_code == 200

    def test_pages_of_other_sites(self, demo_server, post):
        form = {"files": {"prompt": (None, "a red circle")}, "headers": {"origin": "http://evil"}}
        assert demo_server.client.post("/txt2img", **form).status_code == 403
        assert post(sec_fetch_site="cross-site", origin="null").status_code == 403
        assert post(sec_fetch_site="cross-site").json()["detail"][0]["loc"] == ["origin"]

    def test_its_own_page(self, demo_server, post):
        assert post(sec_fetch_site="same-origin", origin=demo_server.url).status_code == 200
        assert post(origin=demo_server.url).status_code == 200
        assert demo_server.client.get("/").status_code == 200


class TestErrors:
    @pytest.mark.parametrize("kind", ["json", "data"])
    @pytest.mark.parametrize("path", ["/txt2img", "/replay", "/adapters"])
    def test_a_long_name_is_not_sent_back(self, demo_server, path, kind):
        size = 500_000
        body = {"x" * size: "1", "prompt": "a", "workflow": "b"}
        answer = demo_server.client.post(path, **{kind: body})
        assert answer.status_code == 400
        assert len(answer.content) < 10_000

    @pytest.mark.parametrize(
        "fields",
        [
            {"lora_weights": [{"name": "a", "x" * 500_000: 1}]},
            {"lora_weights": "x" * 500_000},
            {"lora_weights": [{"name": "a", "scale": {"x" * 500_000: 1}}]},
            {"scheduler": "x" * 500_000},
            {"output_format": "x" * 500_000},
            {"seed": "x" * 500_000},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_long_values_are_not_sent_back(self, post, fields):
        answer = post(content=json.dumps({"prompt": "a", **fields}).encode())
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 10_000

    def test_a_bomb_is_told_the_limit_of_the_service(self, demo_server):
        answer = demo_server.client.post(
            "/img2img", files={"image": ("a.png", _bomb(60_000))}, data={"prompt": "a"}
        )
        assert answer.status_code == 400
        assert "2048 per side" in answer.text
        assert "178956970" not in answer.text

    def test_a_broken_form_for_adapters(self, demo_server):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = demo_server.client.post("/adapters", content=b"no form", headers=headers)
        assert answer.status_code == 400

    def test_adapters_has_no_fields(self, post):
        assert post("/adapters").json()["detail"][0]["loc"] == ["prompt"]


def _bomb(side):
    """A PNG of one colour, whose header says how large it is."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels)


class TestUploads:
    def test_a_body_without_end_for_adapters(self, demo_server):
        chunks = (b'"' + b"x" * 2**20 for _ in range(4))
        answer = demo_server.client.post("/adapters", content=chunks, headers=JSON)
        assert answer.status_code == 400
        assert answer.json()["detail"][0]["loc"] == ["body"]

    def test_half_sent_bodies_of_many_clients(self, demo_server, post, encode):
        """None ends. Those that are beyond the budget are refused, whoever sends text is not."""
        size = 42 * 2**20  # six of them are nearly the 256 MiB that all may hold
        head = (
            f"POST /img2img HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {size}\r\n\r\n"
        )
        port = int(demo_server.url.rpartition(":")[2])
        large = encode("BMP", size=(2048, 2048))
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
                for _ in range(8)
            ]
            answers = [_send_half(client, head.encode(), size - 1) for client in clients]
            refused = [answer for answer in answers if answer]
            assert len(refused) == 2
            assert all(b" 503 " in answer and b"retry-after: 2" in answer for answer in refused)
            assert post().status_code == 200
            assert _upload(demo_server, large) == 503
        give_up = time.monotonic() + 60
        while _upload(demo_server, large) == 503:  # their bytes are free when they are gone
            assert time.monotonic() < give_up


def _send_half(client, head, size):
    """Sends a body but for its end; returns what the server says before that."""
    data = io.BytesIO(head + b" " * size)
    with contextlib.suppress(ConnectionError):
        while chunk := data.read(2**20):
            client.sendall(chunk)
    client.settimeout(0.2)
    with contextlib.suppress(TimeoutError, ConnectionError):
        return client.recv(4096)
    return b""


def _upload(server, file):
    """Sends a file, and no prompt: that is refused once it has been read."""
    return server.client.post("/img2img", files={"image": ("a.bmp", file)}).status_code
