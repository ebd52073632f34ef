"""Text to image as in BentoML's documentation: `bentoml serve legacy_txt2img:svc` in this folder.

It passes the JSON of a request on to the pipeline, so it has no limits of its own; `service.py`
has them. Give `num_inference_steps`, `height` and whatever else the pipeline takes.
"""

import bentoml
from bentoml.io import JSON, Image

import bentoml_diffusers  # noqa: F401 - `bentoml.diffusers` is this package from here on

bento_model = bentoml.diffusers.get("demo:latest")
runner = bento_model.with_options(
    partial_kwargs={"__call__": {"num_inference_steps": 25}}
).to_runner(name="demo-runner")

svc = bentoml.legacy.Service("legacy_txt2img", runners=[runner])


@svc.api(input=JSON(), output=Image())
async def txt2img(input_data: dict):
    images = await runner.async_run(**input_data)
    return images[0][0]
