"""Images by `huggingface_hub.InferenceClient`: from text, and from another image."""

import sys

from huggingface_hub import InferenceClient

SERVER = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:3000"

client = InferenceClient(model=SERVER)
image = client.text_to_image("a small yellow star on a black background in the centre", seed=7)
image.save("star.png")

outlined = InferenceClient(model=f"{SERVER}/models/demo:outline")
red = outlined.image_to_image("star.png", prompt="a small red star on a black background")
red.save("red.png")
