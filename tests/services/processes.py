"""`bentoml serve` as a real process: started, waited for, and always stopped."""

import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]
BENTOML = str(Path(sys.executable).with_name("bentoml"))

# Half a minute for a tiny pipeline on one core, within the limits of a service.
SLOW = {"prompt": "a blue star", "num_inference_steps": 150, "height": 1024, "width": 1024}
# Minutes, longer than any client waits: whoever is served meanwhile has not waited for it.
ENDLESS = {**SLOW, "num_inference_steps": 900}

# A legacy service is three processes, and each of them imports torch.
_START_S = 120
_STOP_S = 20


@dataclass
class Server:
    """A running server: a client for it, and what it has logged."""

    url: str
    process: subprocess.Popen
    log_path: Path
    client: httpx.Client

    @property
    def log(self):
        return self.log_path.read_text()

    def generate(self, path="/txt2img", **fields):
        """Posts JSON and returns the body of a 200."""
        body = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1, **fields}
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.content

    def stop(self):
        """Stops the server as an operator does; its return code is `None` if it does not end."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)

    def check_loading(self, tag):
        """The log says once that a model is loaded, in lines of a log, and nothing of bars."""
        log = self.log
        assert not {"\r", "\x1b"} & {*log}
        assert "requires torchvision" not in log
        said = re.findall(rf"^\S+ \[INFO\] \[\S+:1\] {tag}: (.*)$", log, re.MULTILINE)
        assert said[0] == "loading"
        assert re.fullmatch(r"loaded in \d+\.\d s", said[1])
        assert len(said) == 2

    def wait_for_metric(self, pattern, within_s=60):
        """Waits until a line of the metrics matches."""
        give_up = time.monotonic() + within_s
        while not re.search(pattern, metrics := self.client.get("/metrics").text, re.MULTILINE):
            assert time.monotonic() < give_up, metrics
            time.sleep(0.1)

    def kill(self):
        """Stops the server, and kills what then still runs: workers have sessions of their own."""
        workers = []
        if self.process.poll() is None:
            workers = psutil.Process(self.process.pid).children(recursive=True)
            self.stop()
        for process in (self.process, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def start_server(words, folder, environment, log_path):
    """Runs `bentoml *words` on a free port until the block ends."""
    port = _find_free_port()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [BENTOML, *words, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=90) as client:
        server = Server(url, process, log_path, client)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            server.kill()


def _find_free_port():
    """Below the ports that connections get: one of those may be taken before the server has it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_ready(server):
    give_up = time.monotonic() + _START_S
    while time.monotonic() < give_up:
        assert server.process.poll() is None, server.log
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/readyz", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready after {_START_S} s:\n{server.log}")
