"""Drawings: the same seed gives the same picture, and what a picture says of itself is what it shows."""

from __future__ import annotations

import hashlib
import io
import itertools
import random

import pytest
from PIL import Image

from demo.drawings import BACKGROUNDS, COLOURS, SHAPES, SIZES, Drawing, draw

RGB = tuple[int, int, int]


def distance(one: RGB, other: RGB) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def nearest(pixel: RGB, names: dict[str, RGB]) -> str:
    return min(names, key=lambda name: distance(names[name], pixel))


def shown(drawing: Drawing) -> list[bool]:
    """For every pixel, whether it is nearer to the shape's colour than to the background's."""
    pixels = list(drawing.image.get_flattened_data())
    shape, background = COLOURS[drawing.colour], BACKGROUNDS[drawing.background]
    return [distance(pixel, shape) < distance(pixel, background) for pixel in pixels]


def test_tags_and_caption_say_what_was_asked_for():
    drawing = draw(random.Random(1), colour="red", shape="circle", size="large", background="white")

    assert drawing.tags == ["red", "circle", "large", "white-background", "geometric-shape"]
    assert drawing.caption == "A large red circle on a white background."


def test_the_same_seed_gives_the_same_picture():
    def digest(seed: int) -> str:
        return hashlib.sha256(draw(random.Random(seed)).encode("PNG")).hexdigest()

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


def test_everything_is_drawn_by_lot_when_nothing_is_given():
    rng = random.Random(0)
    drawings = [draw(rng, side=96) for _ in range(300)]

    assert {d.colour for d in drawings} == set(COLOURS)
    assert {d.shape for d in drawings} == set(SHAPES)
    assert {d.size for d in drawings} == set(SIZES)
    assert {d.background for d in drawings} == set(BACKGROUNDS)
    assert {d.image.width > d.image.height for d in drawings} == {True, False}


@pytest.mark.parametrize(("colour", "background"), list(itertools.product(COLOURS, BACKGROUNDS)))
def test_picture_shows_its_colours(colour, background):
    drawing = draw(
        random.Random(7), colour=colour, background=background, shape="square", size="large", side=96
    )
    names = COLOURS | BACKGROUNDS
    seen = dict.fromkeys(names, 0)
    # The noise is averaged away first, as any processor that resizes pictures does it.
    for pixel in drawing.image.reduce(4).get_flattened_data():
        seen[nearest(pixel, names)] += 1

    most, second = sorted(seen, key=seen.__getitem__, reverse=True)[:2]
    assert {most, second} == {colour, background}


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_stay_apart(shape):
    def extents(size: str) -> list[float]:
        found = []
        for seed in range(12):
            drawing = draw(
                random.Random(seed), shape=shape, size=size, colour="blue", background="white", side=128
            )
            width, height = drawing.image.size
            mask = Image.new("L", (width, height))
            mask.putdata([255 * on for on in shown(drawing)])
            left, top, right, bottom = mask.getbbox()
            found.append(max(right - left, bottom - top) / min(width, height))
        return found

    assert max(extents("small")) * 1.5 < min(extents("large"))


def test_shapes_differ():
    masks = {
        tuple(
            shown(
                draw(random.Random(2), shape=shape, size="large", colour="blue", background="white", side=96)
            )
        )
        for shape in SHAPES
    }

    assert len(masks) == len(SHAPES)


@pytest.mark.parametrize("seed", range(20))
def test_shape_lies_wholly_on_the_canvas(seed):
    drawing = draw(random.Random(seed), shape="square", size="large", colour="blue", background="white")
    width, height = drawing.image.size
    on = shown(drawing)
    columns = [x for x in range(width) if any(on[y * width + x] for y in range(height))]
    rows = [y for y in range(height) if any(on[y * width : (y + 1) * width])]

    assert max(columns) - min(columns) == pytest.approx(max(rows) - min(rows), abs=1)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_encode_gives_an_image_file(image_format):
    drawing = draw(random.Random(5))
    read = Image.open(io.BytesIO(drawing.encode(image_format)))

    assert (read.format, read.size, read.mode) == (image_format, drawing.image.size, "RGB")


@pytest.mark.parametrize(
    "wrong", [{"colour": "mauve"}, {"shape": "blob"}, {"size": "huge"}, {"background": "sky"}]
)
def test_unknown_attribute_is_refused(wrong):
    with pytest.raises(KeyError, match=next(iter(wrong.values()))):
        draw(random.Random(0), **wrong)
