"""Asks the service for images with four maps, and puts them side by side.

bentoml serve service:svc
python generate.py --output differential_diffusion.png
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 64
SHOWN_PX = 128
GAP_PX = 12
INPUT = "a big red circle on a blue background at the left"
PROMPTS = (
    "a big yellow star on a blue background at the right",
    "a big green square on a white background at the right",
)


def make_maps() -> dict[str, Image.Image]:
    """Returns maps of ``SIZE_PX``: white keeps, black regenerates, grey is in between."""
    across = np.linspace(0, 1, SIZE_PX)
    values = {
        "white": np.ones(SIZE_PX),
        "left half": (across < 0.5).astype(float),
        "falling": 1 - across,
        "black": np.zeros(SIZE_PX),
    }
    return {
        name: Image.fromarray(np.tile((255 * row).astype(np.uint8), (SIZE_PX, 1)))
        for name, row in values.items()
    }


def ask(url: str, path: str, **fields: Any) -> Image.Image:
    """Posts JSON, with images as base64, and returns the image of the answer."""
    body = {key: _encode(value) for key, value in fields.items()}
    request = urllib.request.Request(  # noqa: S310 - the address is the user's own
        f"{url}{path}",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310
        return Image.open(io.BytesIO(response.read())).convert("RGB")


def _encode(value: Any) -> Any:
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def generate_table(url: str) -> list[list[tuple[str, Image.Image | None]]]:
    """Returns rows of images with their captions: the maps, then what each prompt generates."""
    image = ask(url, "/text2image", prompt=INPUT, num_inference_steps=25, seed=0)
    maps = make_maps()
    rows: list[list[tuple[str, Image.Image | None]]] = [
        [("image", image), *((f"map: {name}", one) for name, one in maps.items())]
    ]
    for prompt in PROMPTS:
        generated = [
            ask(
                url,
                "/differential",
                prompt=prompt,
                image=image,
                diffdiff_map=one,
                num_inference_steps=25,
                seed=3,
            )
            for one in maps.values()
        ]
        rows.append([(prompt, None), *(("", one) for one in generated)])
    return rows


def draw_table(rows: list[list[tuple[str, Image.Image | None]]]) -> Image.Image:
    """Returns all images on one sheet, enlarged, with their captions."""
    cell = SHOWN_PX + GAP_PX
    sheet = Image.new("RGB", (len(rows[0]) * cell + GAP_PX, len(rows) * (cell + GAP_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (caption, image) in enumerate(cells):
            x, y = GAP_PX + column * cell, GAP_PX // 2 + row * (cell + GAP_PX)
            if image is None:
                draw.multiline_text((x, y + 40), _wrap(caption), fill="black")
                continue
            draw.text((x, y), caption, fill="black")
            shown = image.convert("RGB").resize((SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST)
            sheet.paste(shown, (x, y + GAP_PX))
            draw.rectangle((x, y + GAP_PX, x + SHOWN_PX, y + GAP_PX + SHOWN_PX), outline="grey")
    return sheet


def _wrap(text: str) -> str:
    words = text.split()
    return "\n".join(" ".join(words[start : start + 3]) for start in range(0, len(words), 3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", default="http://localhost:3000", help="address of the service")
    parser.add_argument("--output", type=Path, default=Path("differential_diffusion.png"))
    options = parser.parse_args()
    draw_table(generate_table(options.url)).save(options.output, optimize=True)
