"""Generates the two images of the documentation: the gallery and the adapters at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from tools.demo_model import evaluate, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

PROMPTS = (
    "a big red circle on a blue background at the left",
    "a small yellow star on a purple background in the centre",
    "a big white triangle on a green background at the right",
    "a big orange square on a black background in the centre",
    "a small black circle on a yellow background at the right",
    "a big purple star on a white background at the left",
    "a big green square on a yellow background in the centre",
    "a small blue triangle on a white background at the left",
    "a big yellow circle on a red background in the centre",
    "a big black star on a green background at the right",
    "a small white square on a blue background at the left",
    "a big blue circle on a yellow background at the right",
    "a small red triangle on a black background in the centre",
    "a big white star on a red background at the left",
    "a small orange circle on a purple background at the right",
    "a big purple square on a green background in the centre",
)
_IMAGE_PX = 3 * shapes.SIZE_PX
_CAPTION_PX = 40
_GAP_PX = 16
_MARGIN_PX = 88
_INK = (60, 60, 60)

Cell = tuple[Image.Image, str]


def generate_gallery(pipeline: StableDiffusionPipeline) -> Image.Image:
    """Returns 4 x 4 images, each with its prompt under it."""
    images = evaluate.generate(pipeline, PROMPTS)
    cells = list(zip(images, PROMPTS, strict=True))
    return _arrange([cells[start : start + 4] for start in range(0, 16, 4)])


def generate_adapters(folder: Path) -> Image.Image:
    """Returns one row of images for each adapter in ``folder``, same prompts and seeds."""
    pipeline = evaluate.load_pipeline(folder / "pipeline")
    pipeline.load_textual_inversion(folder / "embeddings" / "teal.safetensors", token="<teal>")  # noqa: S106 - a word, no password
    prompts = PROMPTS[:6]
    rows = [_row(pipeline, prompts)]
    evaluate.load_loras(pipeline, folder)
    for names in (["outline"], ["stripes"], ["outline", "stripes"]):
        pipeline.set_adapters(names)
        rows.append(_row(pipeline, prompts))
    pipeline.unload_lora_weights()
    rows.append(_row(pipeline, [_say_teal(prompt) for prompt in prompts]))
    return _arrange(rows, ["none", "outline", "stripes", "both", "<teal>"])


def _row(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> list[Cell]:
    return list(zip(evaluate.generate(pipeline, prompts), prompts, strict=True))


def _say_teal(prompt: str) -> str:
    words = prompt.split()
    return " ".join([*words[:2], "<teal>", *words[3:]])


def _arrange(rows: Sequence[Sequence[Cell]], titles: Sequence[str] = ()) -> Image.Image:
    """Lays rows of images on a white sheet, captions under them, titles at the left."""
    left = _MARGIN_PX if titles else _GAP_PX
    step_x, step_y = _IMAGE_PX + _GAP_PX, _IMAGE_PX + _CAPTION_PX + _GAP_PX
    size = (left + step_x * len(rows[0]), _GAP_PX + step_y * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        y = _GAP_PX + row * step_y
        if titles:
            middle = (left - 12, y + _IMAGE_PX // 2)
            draw.text(middle, titles[row], _INK, ImageFont.load_default(18), anchor="rm")
        for column, (image, caption) in enumerate(cells):
            x = left + column * step_x
            larger = image.resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.LANCZOS)
            sheet.paste(larger, (x, y))
            _write_caption(draw, caption, x + _IMAGE_PX // 2, y + _IMAGE_PX + 4)
    return sheet


def _write_caption(draw: ImageDraw.ImageDraw, caption: str, x: int, y: int) -> None:
    first, _, second = caption.partition(" on a ")
    text = f"{first}\non a {second}"
    draw.multiline_text((x, y), text, _INK, ImageFont.load_default(12), anchor="ma", align="center")
