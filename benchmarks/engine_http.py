"""Many HTTP clients with mixed LoRAs at the demo service, and at plain diffusers behind BentoML.

All sides answer the same requests, in turns: the demo service, the same from one client after the
other, and both ways of `plain_service.py`. Printed are the ratios of the times to the first and the
largest difference of the images in levels of 8 bits::

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from PIL import Image

from bentoml_diffusers.demo import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


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
def serve(*arguments: str) -> Iterator[httpx.Client]:
    """Runs a service in a store of its own; yields a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).with_name("bentoml")
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(  # noqa: S603 - a command of our own
            [command, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "BENTOML_HOME": home},
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            limits = httpx.Limits(max_connections=256)
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=600, limits=limits) as client:
                wait_until_ready(client)
                yield client
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
    """Returns the image and the seconds until it came."""
    started = time.perf_counter()
    answer = client.post("/txt2img", json=body)
    answer.raise_for_status()
    image = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    return image, time.perf_counter() - started


@dataclass(frozen=True)
class Side:
    """What one side took, and generated."""

    seconds: float
    mean_latency_s: float
    images: list[np.ndarray]


def run_side(client: httpx.Client, bodies: list[dict[str, Any]], clients: int) -> Side:
    """Sends all requests from that many clients."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: send(client, body), bodies))
    return Side(
        time.perf_counter() - started,
        statistics.fmean(seconds for _, seconds in answers),
        [image for image, _ in answers],
    )


def main() -> None:
    """Reads the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bodies = draw_bodies(arguments.clients)
    with (
        serve("diffusers", "demo") as engine,
        serve("serve", "plain_service:PlainService") as plain,
    ):
        sides = {
            "engine": lambda: run_side(engine, bodies, arguments.clients),
            "one client": lambda: run_side(engine, bodies, 1),
            "plain": lambda: run_side(plain, with_way(bodies, "plain"), arguments.clients),
            "upstream": lambda: run_side(plain, with_way(bodies, "upstream"), arguments.clients),
        }
        for side in sides.values():  # warms up; the cost profile is measured here
            side()
        rounds = [{name: side() for name, side in sides.items()} for _ in range(arguments.rounds)]
    figures = {"clients": arguments.clients, **compare(rounds)}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


def with_way(bodies: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """Returns the requests for the plain service."""
    return [{**body, "way": way} for body in bodies]


def compare(rounds: list[dict[str, Side]]) -> dict[str, Any]:
    """Returns the medians over the rounds."""
    ours = [sides["engine"] for sides in rounds]
    figures: dict[str, Any] = {
        "engine, requests per second": round(
            statistics.median(len(side.images) / side.seconds for side in ours), 2
        ),
    }
    for name in rounds[0]:
        if name == "engine":
            continue
        pairs = [(sides[name], sides["engine"]) for sides in rounds]
        figures[f"over {name}"] = {
            "requests per second": _median(one.seconds / two.seconds for one, two in pairs),
            "mean latency": _median(one.mean_latency_s / two.mean_latency_s for one, two in pairs),
            "largest difference": max(_difference(one, two) for one, two in pairs),
        }
    return figures


def _median(ratios: Iterable[float]) -> float:
    return round(statistics.median(ratios), 3)


def _difference(one: Side, two: Side) -> int:
    pairs = zip(one.images, two.images, strict=True)
    return int(max(abs(first - second).max() for first, second in pairs))


if __name__ == "__main__":
    main()
