"""Several tasks on one set of weights: `bentoml serve legacy_mega:svc` in this folder.

The model was imported with the signatures `text2img`, `img2img` and `inpaint`.
"""

import bentoml
import PIL.Image
from bentoml.io import JSON, Image, Multipart

import bentoml_diffusers  # noqa: F401 - `bentoml.diffusers` is this package from here on

bento_model = bentoml.diffusers.get("demo:latest")
runner = bento_model.with_options(custom_pipeline="stable_diffusion_mega").to_runner(
    name="demo-runner"
)

svc = bentoml.legacy.Service("legacy_mega", runners=[runner])


@svc.api(input=JSON(), output=Image())
async def txt2img(input_data: dict):
    images = await runner.text2img.async_run(**input_data)
    return images[0][0]


@svc.api(input=Multipart(img=Image(), data=JSON()), output=Image())
async def img2img(img: PIL.Image.Image, data: dict):
    images = await runner.img2img.async_run(image=img.convert("RGB"), **data)
    return images[0][0]
