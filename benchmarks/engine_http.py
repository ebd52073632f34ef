"""Many HTTP clients with mixed LoRAs against one client after the other, on the demo service.

Both sides send the same requests to the same server, in turns; printed are the ratio of the times
and the largest difference of the pictures in levels of 8 bits::

    OMP_NUM_THREADS=1 python benchmarks/engine_http.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from PIL import Image

from bentoml_diffusers.demo import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Iterator


def draw_bodies(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns requests that differ in prompt, steps, guidance, seed and LoRAs."""
    rng = random.Random(seed)
    wishes: list[list[dict[str, Any]]] = [
        [],
        [{"name": "outline"}],
        [{"name": "stripes", "scale": 0.7}],
        [{"name": "outline", "scale": 0.5}, {"name": "stripes", "scale": 0.5}],
    ]
    return [
        {
            "prompt": rng.choice(PROMPTS),
            "num_inference_steps": rng.randint(8, 25),
            "guidance_scale": rng.choice((1.0, 4.0, 5.0)),
            "seed": number,
            "lora_weights": rng.choice(wishes) or None,
        }
        for number in range(count)
    ]


@contextlib.contextmanager
def serve_demo() -> Iterator[str]:
    """Runs the demo service in a store of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).with_name("bentoml")
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(  # noqa: S603 - a command of our own
            [command, "diffusers", "demo", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "BENTOML_HOME": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def wait_until_ready(client: httpx.Client) -> None:
    """Returns when the service answers."""
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise SystemExit("the service did not start")


def send(client: httpx.Client, body: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Returns the picture and the seconds until it came."""
    started = time.perf_counter()
    answer = client.post("/txt2img", json=body)
    answer.raise_for_status()
    picture = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    return picture, time.perf_counter() - started


def run_side(
    client: httpx.Client, bodies: list[dict[str, Any]], clients: int
) -> tuple[float, list[tuple[np.ndarray, float]]]:
    """Sends all requests from that many clients; returns the seconds and the answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: send(client, body), bodies))
    return time.perf_counter() - started, answers


def main() -> None:
    """Reads the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bodies = draw_bodies(arguments.clients)
    ratios, latencies, differences = [], [], []
    limits = httpx.Limits(max_connections=arguments.clients)
    with serve_demo() as url, httpx.Client(base_url=url, timeout=300, limits=limits) as client:
        wait_until_ready(client)
        run_side(client, bodies, arguments.clients)  # the cost profile is measured here
        for _ in range(arguments.rounds):
            alone_s, alone = run_side(client, bodies, 1)
            together_s, together = run_side(client, bodies, arguments.clients)
            ratios.append(alone_s / together_s)
            latencies.append(statistics.fmean(seconds for _, seconds in together))
            pairs = zip(alone, together, strict=True)
            differences += [int(abs(one - two).max()) for (one, _), (two, _) in pairs]
    figures = {
        "clients": arguments.clients,
        "requests per second, times one client": round(statistics.median(ratios), 3),
        "mean latency together, s": round(statistics.median(latencies), 3),
        "largest difference": max(differences),
    }
    print(json.dumps(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
