"""A service that calls another one in a process of its own, by `bentoml.depends`."""

import bentoml
from PIL import Image

import bentoml_diffusers

demo_service = bentoml_diffusers.service("demo:latest", name="demo_service")


@bentoml.service(name="front")
class Front:
    demo_service = bentoml.depends(demo_service)

    @bentoml.api
    async def generate(self, path: str, arguments: dict, colours: dict) -> Image.Image:
        images = {name: Image.new("RGB", (32, 32), colour) for name, colour in colours.items()}
        return await getattr(self.demo_service.to_async, path)(**arguments, **images)

    @bentoml.api
    def generate_in_turn(self, arguments: dict) -> Image.Image:
        return self.demo_service.to_sync.txt2img(**arguments)

    @bentoml.api
    async def adapters(self) -> dict:
        return await self.demo_service.to_async.adapters()
