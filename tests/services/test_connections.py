"""What slow clients can hold of a service: they are sent away, and others are answered."""

import contextlib
import http.client
import socket
import time

import httpx
import pytest
from processes import ROOT

HEAD = b"POST /txt2img HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(serve, tiny_home):
    folder = ROOT / "tests" / "services"
    with serve("bounded_service:svc", home=tiny_home, folder=folder) as running:
        yield running


@pytest.fixture
def connect(server):
    """Opens a connection; an end that never comes is an error after a minute."""
    port = int(server.url.rpartition(":")[2])
    with contextlib.ExitStack() as stack:

        def make(*options):
            client = stack.enter_context(socket.socket())
            for option in options:
                client.setsockopt(*option)
            client.settimeout(60)
            client.connect(("127.0.0.1", port))
            return client

        yield make


def wait_for_end(client):
    """Returns what comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            received += data
    return received


def is_sent_away(client, data):
    """Sends the data every tenth of a second, for a minute at most, and reads nothing."""
    with contextlib.suppress(ConnectionError):
        for _ in range(600):
            client.sendall(data)
            time.sleep(0.1)
        return False
    return True


def is_alive(server):
    """Asks by a connection of its own: one that is idle may be sent away."""
    return httpx.get(f"{server.url}/livez", timeout=60).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /livez HT", HEAD, HEAD + b"content-length: 9\r\n\r\n", HEAD + b"x: " + b"y" * 999],
    ids=["nothing", "part of a line", "half a head", "no body", "a long line"],
)
def test_half_a_request(connect, sent):
    client = connect()
    client.sendall(sent)
    assert wait_for_end(client) == b""


def test_a_body_that_drips(connect):
    client = connect()
    client.sendall(HEAD + b"content-length: 99999\r\n\r\n")
    assert is_sent_away(client, b" ")


def test_who_does_not_read_the_answers(connect):
    client = connect((socket.SOL_SOCKET, socket.SO_RCVBUF, 4096))
    assert is_sent_away(client, b"GET /docs.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 5)


def test_a_connection_between_two_requests_is_kept(server):
    port = int(server.url.rpartition(":")[2])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        for _ in range(4):
            client.request("GET", "/livez")
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"\n")
            time.sleep(0.6)  # in all longer than the service waits for a client
        assert client.sock is not None


def test_others_are_answered_while_all_connections_are_taken(connect, server):
    clients = [connect() for _ in range(20)]
    assert is_alive(server)
    assert wait_for_end(clients[0]) == b""


def test_requests_that_run_are_not_sent_away(connect, server):
    body = b'{"prompt": "a", "num_inference_steps": 20, "height": 256, "width": 256}'
    running = connect()
    running.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    for _ in range(5):  # by then it has been read
        assert is_alive(server)
    others = [connect() for _ in range(20)]
    assert is_alive(server)
    assert running.recv(100).startswith(b"HTTP/1.1 200")
    assert others


def test_a_closed_path(server):
    assert server.client.get("/metrics").status_code == 404
