"""A server that runs out of time, and one that is stopped."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from processes import ENDLESS


def test_timeout_and_stop_in_the_middle_of_a_request(serve, tiny_home):
    with serve("hurried_service:svc", home=tiny_home, folder=Path(__file__).parent) as server:
        before = server.generate()
        steps_of_one = count_steps(server)

        answer = server.client.post("/txt2img", json={**ENDLESS, "height": 512, "width": 512})
        assert answer.status_code == 504
        assert "not finished within" in answer.json()["error"]
        metrics = server.client.get("/metrics").text
        assert 'outcome="expired",task="txt2img"} 1.0' in metrics
        assert 'outcome="cancelled"' not in metrics
        assert count_steps(server) > steps_of_one > 0
        assert server.generate() == before  # within the client's own timeout: the device is free

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.client.post, "/txt2img", json=ENDLESS)
            server.wait_for_metric(r'request_in_progress\{.*"/txt2img".*\} 1\.0$')
            server.stop()
            assert server.process.returncode == 0
            assert _ends(running)


def test_too_many_requests_are_told_when_to_come_again(serve, tiny_home):
    with (
        serve("narrow_service:svc", home=tiny_home, folder=Path(__file__).parent) as server,
        ThreadPoolExecutor(6) as clients,
    ):
        body = {"prompt": "a red circle", "num_inference_steps": 40}
        answers = list(clients.map(lambda _: server.client.post("/txt2img", json=body), range(6)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(1 <= int(answer.headers["retry-after"]) <= 600 for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
        metrics = server.client.get("/metrics").text
        assert f'outcome="refused",task="txt2img"}} {float(len(refused))}' in metrics
        assert "diffusers_requests_per_forward_bucket" in metrics


def count_steps(server):
    metrics = server.client.get("/metrics").text
    return float(re.search(r'diffusers_steps_total\{.*task="txt2img".*\} (\S+)', metrics)[1])


def _ends(running):
    """A request that was cut short is answered by an error, or its connection is closed."""
    try:
        return running.result(timeout=5).status_code >= 500
    except httpx.TransportError:
        return True
