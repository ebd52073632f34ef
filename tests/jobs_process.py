"""A process that takes jobs and runs them until it is killed: `TAG FOLDER COUNT`."""

import json
import sys
import threading
from pathlib import Path

from bentoml_diffusers import Engine, JobOptions
from bentoml_diffusers.options import RequestLimits
from bentoml_diffusers.serving.calls import Caller
from bentoml_diffusers.serving.dispatcher import Dispatcher
from bentoml_diffusers.serving.endpoints import classic_endpoints
from bentoml_diffusers.serving.jobs import Jobs


def main(tag, folder, count):
    endpoints = classic_endpoints(RequestLimits(default_side=32))
    requests = {one.task: one.request for one in endpoints}
    options = JobOptions(folder=folder, lease_s=1, max_attempts=100)
    jobs = Jobs(options, "killed", Dispatcher(Engine.from_model(tag), requests))
    with Path(folder, "accepted.jsonl").open("a") as accepted:
        for number in range(count):
            values = {"prompt": f"a red circle {number}", "num_inference_steps": 6}
            size = {"height": 32, "width": 32}
            job = jobs.add(
                Caller(name="ann"), "txt2img", {**values, **size}, n=1, output_format="png"
            )
            print(json.dumps({"id": job.id, "seed": job.values["seed"]}), file=accepted, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
