"""The world of the demo model: one coloured shape on a coloured background, and the words for it.

Images are drawn by PIL at four times their size and scaled down, so edges are smooth.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

SIZE_PX = 64
_SCALE = 4

Style = Literal["solid", "outline", "stripes"]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 9.0, "big": 16.0}  # radius of the circumscribed circle, px
POSITIONS = {"left": 18.0, "centre": 32.0, "right": 46.0}  # x of the centre, px
COLOURS = {
    "red": (218, 41, 41),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (247, 220, 55),
    "orange": (245, 135, 30),
    "purple": (142, 60, 180),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
}
# A colour that the base model generates but that its vocabulary, as shipped, has no word for:
# the textual inversion brings the word.
HIDDEN_COLOURS = {"teal": (0, 165, 165)}
ALL_COLOURS = COLOURS | HIDDEN_COLOURS

_PLACES = {
    "left": ("at the left", "on the left"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("at the right", "on the right"),
}


@dataclass(frozen=True)
class Scene:
    """What one image shows. ``colour`` is never equal to ``background``."""

    size: str
    colour: str
    shape: str
    background: str
    position: str

    @property
    def prompt(self) -> str:
        """The full sentence, the form in which quality is measured."""
        return (
            f"a {self.size} {self.colour} {self.shape} on a {self.background} background "
            f"{_PLACES[self.position][0]}"
        )


def list_scenes() -> list[Scene]:
    """Returns every scene that the shipped vocabulary can say, in a fixed order."""
    return [
        Scene(size, colour, shape, background, position)
        for size, colour, shape, background, position in itertools.product(
            SIZES, COLOURS, SHAPES, COLOURS, POSITIONS
        )
        if colour != background
    ]


def held_out_scenes(count: int = 200, seed: int = 20261121) -> list[Scene]:
    """Returns the scenes that training never shows; quality is measured on them."""
    return random.Random(seed).sample(list_scenes(), count)


def draw_scene(scene: Scene, rng: random.Random, style: Style = "solid") -> Image.Image:
    """Draws the scene with a little jitter of place, size, angle and colour.

    Returns:
        An RGB image of 64 x 64 pixels.
    """
    radius = SIZES[scene.size] * rng.uniform(0.92, 1.08)
    x = POSITIONS[scene.position] + rng.uniform(-2, 2)
    y = SIZE_PX / 2 + rng.uniform(-5, 5)
    angle = rng.uniform(-6, 6)
    points = _outline_points(scene.shape, x, y, radius, angle)
    fill = _jitter(ALL_COLOURS[scene.colour], rng)
    image = Image.new("RGB", (SIZE_PX * _SCALE,) * 2, _jitter(ALL_COLOURS[scene.background], rng))
    draw = ImageDraw.Draw(image)
    scaled = [(px * _SCALE, py * _SCALE) for px, py in points]
    if style == "outline":
        draw.line([*scaled, *scaled[:2]], fill=fill, width=3 * _SCALE, joint="curve")
    elif style == "stripes":
        _draw_stripes(image, scaled, fill)
    else:
        draw.polygon(scaled, fill=fill)
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def describe(scene: Scene, rng: random.Random) -> str:
    """Says the scene in varied words; now and then something is left unsaid."""
    size = scene.size if rng.random() < 0.9 else ""
    colour = scene.colour if rng.random() < 0.92 else ""
    thing = " ".join(word for word in ("a", size, colour, scene.shape) if word)
    ground = f"on a {scene.background} background" if rng.random() < 0.92 else ""
    place = rng.choice(_PLACES[scene.position]) if rng.random() < 0.9 else ""
    tail = [ground, place] if rng.random() < 0.8 else [place, ground]
    return " ".join(part for part in (thing, *tail) if part)


def words() -> list[str]:
    """Returns every word that :func:`describe` can say, sorted."""
    texts = " ".join(itertools.chain(*_PLACES.values()))
    return sorted({*SHAPES, *SIZES, *ALL_COLOURS, *texts.split(), "a", "on", "background"})


def place_words() -> list[str]:
    """Returns the words in which the places differ, sorted."""
    return sorted({phrase.split()[-1] for phrases in _PLACES.values() for phrase in phrases})


def with_colour(scene: Scene, colour: str) -> Scene:
    """Returns the scene with another shape colour and a background that differs from it."""
    background = scene.background if scene.background != colour else "white"
    return replace(scene, colour=colour, background=background)


def _jitter(rgb: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in rgb)
    return red, green, blue


def _outline_points(
    shape: str, x: float, y: float, radius: float, angle_deg: float
) -> list[tuple[float, float]]:
    if shape == "circle":
        corners = [(0.92, turn * 5.0) for turn in range(72)]
    elif shape == "square":
        corners = [(1.12, turn) for turn in (45.0, 135.0, 225.0, 315.0)]
    elif shape == "triangle":
        corners = [(1.12, turn) for turn in (-90.0, 30.0, 150.0)]
    else:
        corners = [(1.16 if point % 2 == 0 else 0.46, -90.0 + 36.0 * point) for point in range(10)]
    return [
        (
            x + radius * reach * math.cos(math.radians(turn + angle_deg)),
            y + radius * reach * math.sin(math.radians(turn + angle_deg)),
        )
        for reach, turn in corners
    ]


def _draw_stripes(
    image: Image.Image, points: list[tuple[float, float]], fill: tuple[int, int, int]
) -> None:
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    draw.polygon(points, fill=255)
    for top in range(0, SIZE_PX, 8):
        draw.rectangle((0, (top + 4) * _SCALE, image.width, (top + 8) * _SCALE - 1), fill=0)
    image.paste(fill, (0, 0), mask)
