"""Images by the package `openai`: one, a stream with partial images, an edit with a LoRA."""

import base64
import sys
from pathlib import Path

import openai

SERVER = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"
PROMPT = "a big red circle on a blue background at the left"

client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key="none")

answer = client.images.generate(
    model="demo",  # "demo:outline" has the LoRA of that name
    prompt=PROMPT,
    quality="high",
    extra_body={"seed": 7, "negative_prompt": "blurred"},
)
Path("circle.png").write_bytes(base64.b64decode(answer.data[0].b64_json))

stream = client.images.generate(model="demo", prompt=PROMPT, stream=True, partial_images=2)
for event in stream:
    is_partial = event.type == "image_generation.partial_image"
    name = f"partial-{event.partial_image_index}.png" if is_partial else "final.png"
    Path(name).write_bytes(base64.b64decode(event.b64_json))

with open("circle.png", "rb") as image:
    answer = client.images.edit(
        model="demo",
        image=image,
        prompt="a big green circle on a blue background at the left",
        extra_body={"strength": 0.7, "lora_weights": [{"name": "outline", "scale": 0.8}]},
    )
Path("green.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
