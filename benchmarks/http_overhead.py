"""What HTTP adds to a request of one client: an engine in this process against the demo service.

Both answer the same requests in turns, so that whatever else the machine does meets both. The time
of the engine has the encoding of the PNG with its workflow in it, which is work and not transport.
Printed are the medians, and the median of the differences, for a file, JSON and an event stream::

    OMP_NUM_THREADS=1 python benchmarks/http_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import diffusers
from engine_http import serve

from bentoml_diffusers import EmbedOptions, Engine
from bentoml_diffusers.demo import PIPELINE
from bentoml_diffusers.serving.encoding import encode_result

if TYPE_CHECKING:
    from collections.abc import Callable

BODY = {
    "prompt": "a big red circle on a blue background at the left",
    "num_inference_steps": 4,
    "height": 64,
    "width": 64,
    "seed": 7,
}
ACCEPTED = {"file": "image/png", "json": "application/json", "events": "text/event-stream"}


def measure(function: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Runs both in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(PIPELINE)
    with Engine(pipeline) as engine, serve("diffusers", "demo") as client:

        def run() -> None:
            result = engine.run("txt2img", **BODY, return_workflow=True)
            encode_result(result, "png", EmbedOptions(workflow=True))

        def ask(form: str) -> None:
            answer = client.post("/txt2img", json=BODY, headers={"accept": ACCEPTED[form]})
            answer.raise_for_status()

        for form in ACCEPTED:
            ask(form)  # the first one of each imports things
        run()
        seconds: dict[str, list[float]] = {name: [] for name in ("engine", *ACCEPTED)}
        for _ in range(options.rounds):
            seconds["engine"].append(measure(run))
            for form in ACCEPTED:
                seconds[form].append(measure(lambda form=form: ask(form)))
    lone = statistics.median(seconds["engine"])
    print(f"engine {lone * 1000:.1f} ms")
    for form in ACCEPTED:
        pairs = zip(seconds[form], seconds["engine"], strict=True)
        added = statistics.median(http - own for http, own in pairs)
        print(f"{form} {statistics.median(seconds[form]) * 1000:.1f} ms, {added * 1000:+.1f} ms")


if __name__ == "__main__":
    main()
