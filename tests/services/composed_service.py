"""A service that has another one paint, in a process of its own, as `bentoml.depends` does it."""

import bentoml
from PIL import Image

import bentoml_diffusers

painter = bentoml_diffusers.service("demo:latest", name="painter")


@bentoml.service(name="front")
class Front:
    painter = bentoml.depends(painter)

    @bentoml.api
    async def paint(self, path: str, arguments: dict, colours: dict) -> Image.Image:
        images = {name: Image.new("RGB", (32, 32), colour) for name, colour in colours.items()}
        return await getattr(self.painter.to_async, path)(**arguments, **images)

    @bentoml.api
    def paint_in_turn(self, arguments: dict) -> Image.Image:
        return self.painter.to_sync.txt2img(**arguments)

    @bentoml.api
    async def adapters(self) -> dict:
        return await self.painter.to_async.adapters()
