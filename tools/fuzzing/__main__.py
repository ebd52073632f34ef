"""Sends random requests, right and wrong ones, of all that the OpenAPI document of a service says.

Needs `pip install schemathesis`. It serves the demo model within narrow limits, from a model store
of its own, and ends with 1 if an answer was a 500.

    python -m tools.fuzzing                  # 5,000 requests
    python -m tools.fuzzing --requests 200
    python -m tools.fuzzing --url http://localhost:3000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_S = 120
_HERE = Path(__file__).parent


@contextlib.contextmanager
def serve_demo() -> Iterator[str]:
    """Serves the demo model until the end of the block; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True"}
        program = "import bentoml_diffusers; bentoml_diffusers.import_demo_models()"
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)  # noqa: S603
        command = [sys.executable, "-m", "bentoml", "serve", "small_service:svc"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(  # noqa: S603
            [*command, *where], cwd=_HERE, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            yield _wait_for(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait()


def _wait_for(url: str) -> str:
    give_up = time.monotonic() + _START_S
    while time.monotonic() < give_up:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/readyz")  # noqa: S310 - of this machine
            return url
        time.sleep(0.5)
    raise TimeoutError(f"{url} is not ready after {_START_S} seconds")


def fuzz(url: str, requests: int) -> int:
    """Sends the requests; returns the exit status of schemathesis."""
    with urllib.request.urlopen(f"{url}/docs.json") as answer:  # noqa: S310 - as above
        paths = json.load(answer)["paths"]
    # Those without a body are soon tried in every way.
    with_body = sum("requestBody" in one for item in paths.values() for one in item.values())
    each = str(-(-requests // with_body))
    options = ["--phases", "fuzzing", "--checks", "not_a_server_error", "--max-examples", each]
    more = ["--no-shrink", "--continue-on-failure", "--suppress-health-check", "all"]
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{url}/docs.json",
        "--url",
        url,
        *options,
        *more,
    ]
    print(f"{with_body} operations with a body, {each} requests for each", flush=True)
    return subprocess.run(command, check=False).returncode  # noqa: S603


def main() -> int:
    """Fuzzes a service that it starts, or one that runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--url", help="of a service that runs")
    options = parser.parse_args()
    served = contextlib.nullcontext(options.url) if options.url else serve_demo()
    with served as url:
        return fuzz(url, options.requests)


if __name__ == "__main__":
    sys.exit(main())
