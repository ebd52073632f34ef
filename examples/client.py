"""Asks a running service for an image, with nothing but Python's own library.

bentoml diffusers demo
python client.py "a big red circle on a blue background at the left"
python client.py "a small yellow star on a black background" --image image.png
python client.py "a small yellow star on a black background" --image image.png --mask mask.png
"""

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def generate(url: str, task: str, **fields: Any) -> tuple[bytes, str]:
    """Posts a request to ``/txt2img``, ``/img2img`` or ``/inpaint``.

    Returns:
        The image's file, and the seed that generates it again.

    Raises:
        urllib.error.HTTPError: The service refused; the body says which field is wrong.
    """
    request = urllib.request.Request(  # noqa: S310 - the address is the user's own
        f"{url}/{task}",
        data=json.dumps(fields).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        for warning in json.loads(answer.headers.get("x-warnings", "[]")):
            print(f"warning: {warning}", file=sys.stderr)
        return answer.read(), answer.headers["x-seed"]


def encode(path: Path) -> str:
    """Returns a file in base64."""
    return base64.b64encode(path.read_bytes()).decode()


def main() -> None:
    """Generates from text, over an image if there is one, or where a mask is white."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--image", type=Path, help="image to start from")
    parser.add_argument("--mask", type=Path, help="image as large, white where to regenerate")
    parser.add_argument("--strength", type=float, default=0.8, help="how much to regenerate")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lora", action="append", default=[], help="name of a stored LoRA")
    parser.add_argument("--output", type=Path, default=Path("image.png"))
    parser.add_argument("--url", default="http://localhost:3000")
    given = parser.parse_args()
    fields: dict[str, Any] = {
        "prompt": given.prompt,
        "num_inference_steps": given.num_inference_steps,
        "lora_weights": [{"name": name} for name in given.lora],
        "seed": given.seed,
    }
    task = "txt2img"
    if given.image:
        task = "img2img"
        fields["image"] = encode(given.image)
        fields["strength"] = given.strength
    if given.mask:
        task = "inpaint"
        fields["mask_image"] = encode(given.mask)
    try:
        image, seed = generate(given.url, task, **fields)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"{given.url} does not answer: {error.reason}")
    given.output.write_bytes(image)
    print(f"{given.output}: generated with seed {seed}")


if __name__ == "__main__":
    main()
