"""What is in a picture: six places with coloured shapes, or three coloured bars; and how it is drawn. Torch-free.

A picture is 84 x 84 pixels, nine visual tokens of 28 x 28: two rows of three for the scene, one row for a caption.
Every place of a scene lies in one token (a bar in one column of two), and the frame makes each place look different
from the others: both are what lets a tiny model read the picture within minutes.
Knows nothing about questions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

PLACE = 28
"""Pixels: the side of a place, and of one visual token."""
COLUMNS, ROWS = 3, 2
SIZE = 3 * PLACE
MAX_HEIGHT = 4
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")

_UNIT = 13
"""Pixels: the height of one unit of a bar."""
_EMPTY_SHARE = 0.2
_HELD_OUT_SHARE = 1 / 6


def seeded(seed: str) -> Random:
    """The same choices for the same seed, on every machine."""
    return Random(seed)  # noqa: S311 - problems, not secrets


@dataclass(frozen=True)
class Shape:
    """One shape."""

    colour: str
    form: str


@dataclass(frozen=True)
class Grid:
    """Six places, row by row from the top left; None: nothing there."""

    places: tuple[Shape | None, ...]

    def num_of(self, colour: str) -> int:
        return sum(1 for shape in self.places if shape and shape.colour == colour)


@dataclass(frozen=True)
class Bar:
    """One bar."""

    colour: str
    height: int
    """1 to MAX_HEIGHT units."""


@dataclass(frozen=True)
class Chart:
    """Three bars of different colours, from left to right."""

    bars: tuple[Bar, ...]

    def height_of(self, colour: str) -> int | None:
        return next((bar.height for bar in self.bars if bar.colour == colour), None)


Scene = Grid | Chart


def random_grid(random: Random) -> Grid:
    """Every place by itself: empty, or any shape in any colour."""
    return Grid(tuple(_random_shape(random) for _ in range(ROWS * COLUMNS)))


def random_chart(random: Random) -> Chart:
    """Three different colours, any heights."""
    colours = random.sample(sorted(COLOURS), COLUMNS)
    return Chart(tuple(Bar(colour, random.randint(1, MAX_HEIGHT)) for colour in colours))


def _random_shape(random: Random) -> Shape | None:
    if random.random() < _EMPTY_SHARE:
        return None
    return Shape(random.choice(sorted(COLOURS)), random.choice(SHAPES))


def is_held_out(scene: Scene) -> bool:
    """On which side a scene is, by its own content: whatever seeds and sizes are chosen, no scene is on both sides."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] < 256 * _HELD_OUT_SHARE


def draw(scene: Scene, caption: str = "", *, jitter: Random) -> Image.Image:
    """The picture; jitter moves and resizes things by a pixel. caption: at most two lines of about 14 letters."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, SIZE - 1, ROWS * PLACE), outline="black", width=2)
    if isinstance(scene, Grid):
        for index, shape in enumerate(scene.places):
            if shape is not None:
                _draw_shape(canvas, shape, index, jitter)
    else:
        for column, bar in enumerate(scene.bars):
            left = PLACE * column + 5 + jitter.randint(-1, 1)
            bottom = ROWS * PLACE - 1
            canvas.rectangle((left, bottom - _UNIT * bar.height, left + 18, bottom), fill=COLOURS[bar.colour])
    for number, line in enumerate(caption.split("\n")):
        canvas.text((3, ROWS * PLACE + 2 + 12 * number), line, fill="black", font=_FONT)
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, index: int, jitter: Random) -> None:
    row, column = divmod(index, COLUMNS)
    x = PLACE * column + PLACE // 2 + jitter.randint(-1, 1)
    y = PLACE * row + PLACE // 2 + jitter.randint(-1, 1)
    radius = jitter.randint(8, 10)
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[shape.colour]
    if shape.form == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape.form == "square":
        canvas.rectangle(box, fill=fill)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)


_FONT = ImageFont.load_default(10)
