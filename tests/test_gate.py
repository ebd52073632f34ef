"""Which hosts and pages a service answers, by where it listens and what its operator allows."""

import copy

import bentoml
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from bentoml_diffusers import _compat, errors
from bentoml_diffusers.serving.gate import Gate
from bentoml_diffusers.serving.refusals import UploadsFull
from bentoml_diffusers.serving.uploads import UploadBudget


@pytest.fixture
def ask():
    """Sends a request to a guarded app that listens at an address; returns the status."""

    def send(address, host, *, allowed=None, **headers):
        async def answer(request):
            del request
            return PlainTextResponse("done")

        app = Starlette(routes=[Route("/", answer, methods=["POST"])])
        urls = BentoMLContainer.remote_runner_mapping
        before = urls.get()
        urls.set({"diffusers": f"http://{address}:3000"} if address else {})
        try:
            guarded = Gate(app, service_name="diffusers", allowed_hosts=allowed)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            client = TestClient(guarded)
            return client.post("/", headers={"host": host, **named}).status_code
        finally:
            urls.set(before)

    return send


@pytest.mark.parametrize(
    ("address", "allowed", "host", "status"),
    [
        ("127.0.0.1", None, "localhost:3000", 200),
        ("127.0.0.1", None, "demo.localhost:3000", 200),
        ("127.0.0.1", None, "gpu.example", 403),
        ("::1", None, "[::1]:3000", 200),
        ("::1", None, "gpu.example", 403),
        ("127.0.0.1", ["gpu.example"], "GPU.example.:80", 200),
        ("127.0.0.1", ["gpu.example"], "other.example", 403),
        ("localhost", None, "gpu.example", 200),  # BentoML's name for all addresses
        ("localhost", ["gpu.example"], "other.example", 403),
        ("localhost", ["gpu.example"], "gpu.example", 200),
        ("", None, "gpu.example", 200),  # an app in a server of one's own
    ],
)
def test_hosts(ask, address, allowed, host, status):
    assert ask(address, host, allowed=allowed) == status


@pytest.mark.parametrize(
    ("site", "origin", "status"),
    [
        ("cross-site", "https://evil.example", 403),
        ("same-origin", "https://gpu.example", 200),
        ("same-site", "https://app.gpu.example", 200),
        ("none", "", 200),
        (None, "https://behind.a.proxy", 200),
    ],
)
def test_pages_of_other_sites(ask, site, origin, status):
    headers = {"origin": origin} | ({"sec_fetch_site": site} if site else {})
    assert ask("localhost", "gpu.example", **headers) == status


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("evil.example:3000", "http://evil.example:3000", 403),
        ("EVIL.example.:3000", "http://EVIL.example.:3000", 403),
        ("gpu.example", "http://gpu.example", 200),  # a proxy at port 80 passes its name on
        ("gpu.example:8443", "https://gpu.example:8443", 200),
        ("gpu.example:3000", "", 200),  # no page
        ("192.168.0.7:3000", "http://192.168.0.7:3000", 200),
        ("[fe80::7]:3000", "http://[fe80::7]:3000", 200),
        ("gpu:3000", "http://gpu:3000", 200),
        ("demo.localhost:3000", "http://demo.localhost:3000", 200),
    ],
)
def test_a_page_that_points_a_name_of_its_own_at_this_machine(ask, host, origin, status):
    """On all addresses, BentoML's default, with no hosts that the operator names."""
    assert ask("localhost", host, origin=origin) == status


def test_a_page_by_a_name_that_the_operator_allows(ask):
    names = {"allowed": ["gpu.example"], "origin": "http://gpu.example:3000"}
    assert ask("localhost", "gpu.example:3000", **names) == 200


def test_pages_that_cors_allows(ask):
    before = BentoMLContainer.config.get()
    cors = {"enabled": True, "access_control_allow_origins": ["https://page.example"]}
    changed = copy.deepcopy(before)
    changed["api_server"]["http"]["cors"] |= cors
    BentoMLContainer.config.set(changed)
    # Made once for a process, by another test perhaps.
    BentoMLContainer.access_control_options.set({"allow_origins": ["https://page.example"]})
    try:
        allowed, other = (
            ask("localhost", "gpu.example", origin=origin, sec_fetch_site="cross-site")
            for origin in ("https://page.example", "https://evil.example")
        )
    finally:
        BentoMLContainer.config.set(before)
        BentoMLContainer.access_control_options.reset()
    assert (allowed, other) == (200, 403)


def test_the_address_of_a_neighbour_is_no_host():
    before = BentoMLContainer.remote_runner_mapping.get()
    BentoMLContainer.remote_runner_mapping.set({"demo_service": "file:///tmp/a.sock"})
    try:
        assert _compat.bound_host("demo_service") != "127.0.0.1"
    finally:
        BentoMLContainer.remote_runner_mapping.set(before)


def test_errors_of_this_package_are_none_of_bentoml_s_client():
    own = list(bentoml.exceptions.BentoMLException.error_mapping.values())
    assert not any(issubclass(cls, errors.DiffusersError) for cls in own)


class Sender:
    """A request whose body comes in parts."""

    def __init__(self, *sizes):
        self.scope = {"type": "http", "headers": []}
        self.parts = [{"type": "http.request", "body": b"x" * size} for size in sizes]

    async def receive(self):
        return self.parts.pop(0)


KIB = 1024


async def _receive_all(budget, sender, max_bytes=10_000 * KIB):
    with budget.bound(sender, max_bytes) as request:
        for _ in range(len(sender.parts)):
            await request.receive()


@pytest.mark.parametrize("ending", [None, ValueError, GeneratorExit])
def test_a_budget_is_shared_and_free_again(ending):
    import asyncio

    async def run():
        budget = UploadBudget(200 * KIB)
        await _receive_all(budget, Sender(5_000 * KIB))  # alone
        with budget.bound(Sender(200 * KIB), 10_000 * KIB) as held:
            await held.receive()
            await _receive_all(budget, Sender(64 * KIB))  # text only
            await _receive_all(budget, Sender(64 * KIB, 64 * KIB))  # with the other: 200
            with pytest.raises(UploadsFull):
                await _receive_all(budget, Sender(100 * KIB, 100 * KIB))
            await _receive_all(budget, Sender(128 * KIB))
            if ending:
                raise ending
        await _receive_all(budget, Sender(5_000 * KIB))

    if ending is None:
        asyncio.run(run())
    else:
        with pytest.raises(ending):
            asyncio.run(run())
