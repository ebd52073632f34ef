"""Says what an image shows, by plain arithmetic on its pixels: numpy and PIL, no network."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from tools.demo_model import shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

_GRID_PX = 32
_TEMPLATES_PER_KIND = 48
_FAINTEST = 24.0  # distance in RGB from the background below which there is no shape

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """What an image shows; all but ``background`` are empty where it shows no shape.

    ``hollow`` says that the middle of the shape has the colour of the background.
    """

    background: str
    colour: str = ""
    shape: str = ""
    position: str = ""
    size: str = ""
    style: str = ""
    hollow: bool = False

    def agrees_with(self, scene: shapes.Scene) -> dict[str, bool]:
        """Returns, for each property of a scene, whether the image has it."""
        return {
            name: getattr(self, name) == getattr(scene, name)
            for name in ("background", "colour", "shape", "position", "size")
        }


@dataclass(frozen=True)
class _Template:
    shape: str
    mask: Floats
    extent_px: int


def judge_image(image: Image.Image) -> Judgement:
    """Returns what an RGB image of 64 x 64 pixels shows; other sizes are scaled to that."""
    pixels = _pixels(image)
    ground = _border_colour(pixels)
    background = nearest_colour(ground)
    mask = _soft_mask(pixels, ground)
    if mask is None:
        return Judgement(background)
    solid = mask > 0.5
    hollow = _is_hollow(pixels, solid, background)
    style = _judge_style(solid, hollow=hollow)
    columns = np.nonzero(solid.any(axis=0))[0]
    cut_out = _normalise(mask)
    best = max(_templates(style), key=lambda template: _overlap(cut_out, template.mask))
    return Judgement(
        background=background,
        colour=nearest_colour(_shape_colour(pixels, solid)),
        shape=best.shape,
        position=_nearest(shapes.POSITIONS, (columns[0] + columns[-1] + 1) / 2),
        size="small" if _extent(solid) < _extent_limits(style)[best.shape] else "big",
        style=style,
        hollow=hollow,
    )


def nearest_colour(rgb: Floats) -> str:
    """Returns the name of the palette colour nearest to ``rgb``, values in [0, 255]."""
    return min(
        shapes.ALL_COLOURS,
        key=lambda name: float(np.linalg.norm(rgb - np.array(shapes.ALL_COLOURS[name]))),
    )


def _nearest(places: Mapping[str, float], value: float) -> str:
    return min(places, key=lambda name: abs(places[name] - value))


def _pixels(image: Image.Image) -> Floats:
    size = (shapes.SIZE_PX, shapes.SIZE_PX)
    rgb = image.convert("RGB")
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.BOX)
    return np.asarray(rgb, dtype=np.float64)


def _border_colour(pixels: Floats) -> Floats:
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[2:-2, 2:-2] = False
    return np.median(pixels[frame], axis=0)


def _soft_mask(pixels: Floats, ground: Floats) -> Floats | None:
    """How far each pixel is on the way from background (0) to shape (1)."""
    distance = np.linalg.norm(pixels - ground, axis=2)
    # The smallest shape, a striped star, covers little more than 20 pixels.
    reference = float(np.percentile(distance, 99.5))
    if reference < _FAINTEST:
        return None
    return np.clip(distance / reference, 0, 1)


def _shape_colour(pixels: Floats, solid: npt.NDArray[np.bool_]) -> Floats:
    eroded = np.asarray(Image.fromarray(solid).convert("L").filter(ImageFilter.MinFilter(3))) > 0
    return np.median(pixels[eroded if eroded.sum() >= 5 else solid], axis=0)


def _is_hollow(pixels: Floats, solid: npt.NDArray[np.bool_], background: str) -> bool:
    ys, xs = np.nonzero(solid)
    # Of a triangle the middle of the box is inside too, and an outline has no other middle.
    y, x = (ys.min() + ys.max()) // 2, (xs.min() + xs.max()) // 2
    patch = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3)
    return nearest_colour(np.median(patch, axis=0)) == background


def _judge_style(solid: npt.NDArray[np.bool_], *, hollow: bool) -> shapes.Style:
    widths = solid.sum(axis=1)
    rows = np.nonzero(widths > 0.12 * widths.max())[0]
    if np.diff(rows).max(initial=1) >= 3:
        return "stripes"
    return "outline" if hollow else "solid"


def _extent(solid: npt.NDArray[np.bool_]) -> int:
    return max(int(np.ptp(line)) + 1 for line in np.nonzero(solid))


def _normalise(mask: Floats) -> Floats:
    """Cuts the shape out of its soft mask and scales it to a square grid."""
    ys, xs = np.nonzero(mask > 0.5)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    image = Image.fromarray((mask * 255).astype(np.uint8))
    scaled = image.resize((_GRID_PX, _GRID_PX), Image.Resampling.BILINEAR, box=box)
    return np.asarray(scaled, dtype=np.float64) / 255


def _overlap(first: Floats, second: Floats) -> float:
    """Intersection over union of two soft masks."""
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


@cache
def _templates(style: shapes.Style) -> tuple[_Template, ...]:
    rng = random.Random(0)
    templates = []
    for shape in shapes.SHAPES:
        for number in range(_TEMPLATES_PER_KIND):
            size = list(shapes.SIZES)[number % 2]
            scene = shapes.Scene(size, "black", shape, "white", "centre")
            pixels = _pixels(shapes.draw_scene(scene, rng, style))
            mask = _soft_mask(pixels, _border_colour(pixels))
            assert mask is not None
            templates.append(_Template(shape, _normalise(mask), _extent(mask > 0.5)))
    return tuple(templates)


@cache
def _extent_limits(style: shapes.Style) -> dict[str, float]:
    """The extent between small and big, in pixels, for each shape."""
    return {
        shape: float(np.mean([t.extent_px for t in _templates(style) if t.shape == shape]))
        for shape in shapes.SHAPES
    }
