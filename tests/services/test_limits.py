"""A server that runs out of time, and one that is stopped."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from processes import SLOW


def test_timeout_and_stop_in_the_middle_of_a_request(serve, tiny_home):
    with serve("hurried_service:svc", home=tiny_home, folder=Path(__file__).parent) as server:
        before = server.paint()

        started = time.monotonic()
        answer = server.client.post("/txt2img", json=SLOW)
        assert answer.status_code == 504
        assert time.monotonic() - started < 6
        assert server.paint() == before

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.client.post, "/txt2img", json=SLOW)
            time.sleep(1)
            assert server.stop() < 10
            assert server.process.returncode == 0
            assert _ends(running)


def _ends(running):
    """A request that was cut short is answered by an error, or its connection is closed."""
    try:
        return running.result(timeout=5).status_code >= 500
    except httpx.TransportError:
        return True
