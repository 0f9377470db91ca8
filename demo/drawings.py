"""Drawn pictures that carry their own truth: what the demo tags, what its model was taught with, what tests ask.

A drawing shows one coloured shape on a plain background. Everything in it comes from a :class:`random.Random`,
so that the same seed gives the same picture; only Pillow is needed.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (220, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 20),
    "green": (30, 155, 60),
    "cyan": (40, 205, 215),
    "blue": (35, 65, 215),
    "purple": (125, 35, 155),
    "pink": (245, 120, 185),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
    "black": (10, 10, 10),
    "beige": (225, 208, 170),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
# The shape's extent as a part of the canvas's shorter side. The gap keeps the two sizes apart.
SIZES: dict[str, tuple[float, float]] = {"small": (0.28, 0.38), "large": (0.62, 0.85)}
# Width and height, as parts of the longer side.
ASPECTS: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0))

_SUPERSAMPLE = 3
_COLOUR_JITTER = 8
MAX_NOISE = 0.12


@dataclass(frozen=True)
class Drawing:
    """A picture and the truth about it.

    :param image: the picture, RGB.
    :param colour: the shape's colour, a key of :data:`COLOURS`.
    :param shape: one of :data:`SHAPES`.
    :param size: ``small`` or ``large``.
    :param background: a key of :data:`BACKGROUNDS`.
    """

    image: Image.Image
    colour: str
    shape: str
    size: str
    background: str

    @property
    def tags(self) -> list[str]:
        """The five tags of this picture, in the order in which the demo model gives them."""
        return [self.colour, self.shape, self.size, f"{self.background}-background", "geometric-shape"]

    @property
    def caption(self) -> str:
        """The sentence that describes this picture."""
        return f"A {self.size} {self.colour} {self.shape} on a {self.background} background."

    def encode(self, image_format: str = "PNG", *, quality: int = 90) -> bytes:
        """The picture as the bytes of an image file.

        :param image_format: ``PNG`` or ``JPEG``.
        :param quality: JPEG quality; PNG has none.
        """
        buffer = io.BytesIO()
        options = {"quality": quality} if image_format == "JPEG" else {}
        self.image.save(buffer, format=image_format, **options)
        return buffer.getvalue()


def draw(
    rng: random.Random,
    *,
    colour: str | None = None,
    shape: str | None = None,
    size: str | None = None,
    background: str | None = None,
    side: int | None = None,
    aspect: tuple[float, float] | None = None,
) -> Drawing:
    """Draw one picture; what is not given is drawn by lot.

    :param rng: decides everything that is not given: the same state gives the same picture.
    :param colour: a key of :data:`COLOURS`.
    :param shape: one of :data:`SHAPES`.
    :param size: a key of :data:`SIZES`.
    :param background: a key of :data:`BACKGROUNDS`.
    :param side: the longer side of the canvas in pixels.
    :param aspect: width and height as parts of the longer side.
    :raises KeyError: for a colour, shape, size or background that does not exist.
    """
    colour = colour or rng.choice(list(COLOURS))
    shape = shape or rng.choice(SHAPES)
    size = size or rng.choice(list(SIZES))
    background = background or rng.choice(list(BACKGROUNDS))
    side = side or rng.randint(96, 256)
    aspect = aspect or rng.choices(ASPECTS, weights=(2, 1, 1))[0]
    width, height = round(side * aspect[0]), round(side * aspect[1])

    image = Image.new("RGB", (width, height), jitter(rng, BACKGROUNDS[background]))
    extent = round(min(width, height) * rng.uniform(*SIZES[size]))
    left, top = rng.randint(0, width - extent), rng.randint(0, height - extent)
    image.paste(jitter(rng, COLOURS[colour]), (left, top), mask(shape, extent))
    strength = rng.uniform(0, MAX_NOISE)
    image = Image.blend(image, make_noise(rng, image.size), strength)
    return Drawing(image=image, colour=colour, shape=shape, size=size, background=background)


def jitter(rng: random.Random, colour: RGB) -> RGB:
    """A colour beside the given one."""
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for channel in colour
    )
    return red, green, blue


def make_noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A picture of nothing but noise; Pillow's own can't be seeded."""
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def mask(shape: str, extent: int) -> Image.Image:
    """The shape in white on black, as wide and as high as ``extent``, with smooth edges."""
    full = extent * _SUPERSAMPLE
    canvas = Image.new("L", (full, full), 0)
    _PAINTERS[shape](ImageDraw.Draw(canvas), full - 1)
    return canvas.reduce(_SUPERSAMPLE)


def _paint_circle(pen: ImageDraw.ImageDraw, last: int) -> None:
    pen.ellipse((0, 0, last, last), fill=255)


def _paint_square(pen: ImageDraw.ImageDraw, last: int) -> None:
    # A little inside its box: its area then comes near to the circle's, and shape and size stay apart.
    margin = last * 0.06
    pen.rectangle((margin, margin, last - margin, last - margin), fill=255)


def _paint_triangle(pen: ImageDraw.ImageDraw, last: int) -> None:
    pen.polygon([(last / 2, last * 0.02), (last, last * 0.96), (0, last * 0.96)], fill=255)


def _paint_cross(pen: ImageDraw.ImageDraw, last: int) -> None:
    pen.rectangle((last * 0.35, 0, last * 0.65, last), fill=255)
    pen.rectangle((0, last * 0.35, last, last * 0.65), fill=255)


def _paint_star(pen: ImageDraw.ImageDraw, last: int) -> None:
    middle, points = last / 2, list[Point]()
    for corner in range(10):
        radius = middle if corner % 2 == 0 else middle * 0.45
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((middle + radius * math.cos(angle), middle + radius * math.sin(angle)))
    pen.polygon(points, fill=255)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "circle": _paint_circle,
    "square": _paint_square,
    "triangle": _paint_triangle,
    "cross": _paint_cross,
    "star": _paint_star,
}
