"""Drawn moving pictures that carry their own truth: a coloured shape that crosses a plain background, or stays still.

The shapes, colours and backgrounds are those of :mod:`demo.drawings`. Everything comes from a
:class:`random.Random`: the same seed gives the same frames. Pillow draws them; PyAV is needed only to encode them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from PIL import Image

from demo.drawings import ASPECTS, BACKGROUNDS, COLOURS, MAX_NOISE, SHAPES, SIZES, jitter, make_noise, mask

# How x and y change, y pointing down as in every picture.
MOTIONS: dict[str, tuple[int, int]] = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays still": (0, 0),
}
# What a shape needs to be large, and still have room to move in.
_EXTENTS: dict[str, tuple[float, float]] = {"small": SIZES["small"], "large": (SIZES["large"][0], 0.7)}
# The way that a moving shape covers, as a part of the way that the canvas leaves it.
_WAY = (0.75, 1.0)


@dataclass(frozen=True)
class MovingDrawing:
    """A moving picture and the truth about it.

    :param frames: the pictures in order, RGB, all of one size, even in width and height.
    :param fps: how many of them are shown in a second.
    :param colour: the shape's colour, a key of :data:`demo.drawings.COLOURS`.
    :param shape: one of :data:`demo.drawings.SHAPES`.
    :param size: ``small`` or ``large``.
    :param background: a key of :data:`demo.drawings.BACKGROUNDS`.
    :param motion: a key of :data:`MOTIONS`.
    """

    frames: tuple[Image.Image, ...]
    fps: float
    colour: str
    shape: str
    size: str
    background: str
    motion: str

    @property
    def caption(self) -> str:
        """The sentence that describes this moving picture."""
        return f"A {self.size} {self.colour} {self.shape} {self.motion} on a {self.background} background."

    def sampled(self, fps: float) -> MovingDrawing:
        """The same moving picture with fewer frames a second, from the first on.

        :param fps: at most the frames per second of this one.
        """
        count = max(1, round(len(self.frames) * fps / self.fps))
        frames = tuple(self.frames[int(number * self.fps / fps)] for number in range(count))
        return replace(self, frames=frames, fps=fps)

    def encode(self, *, crf: int = 18) -> bytes:
        """The moving picture as the bytes of an MP4 file (H.264).

        :param crf: how much x264 may lose, from 0 (nothing) to 51.
        """
        return encode(self.frames, fps=self.fps, crf=crf)


def draw_moving(
    rng: random.Random,
    *,
    colour: str | None = None,
    shape: str | None = None,
    size: str | None = None,
    background: str | None = None,
    motion: str | None = None,
    side: int | None = None,
    aspect: tuple[float, float] | None = None,
    seconds: float = 4.0,
    fps: float = 8.0,
) -> MovingDrawing:
    """Draw one moving picture; what is not given is drawn by lot.

    The shape moves evenly from the first frame to the last, and is always wholly on the canvas.

    :param rng: decides everything that is not given: the same state gives the same frames.
    :param colour: a key of :data:`demo.drawings.COLOURS`.
    :param shape: one of :data:`demo.drawings.SHAPES`.
    :param size: a key of :data:`demo.drawings.SIZES`.
    :param background: a key of :data:`demo.drawings.BACKGROUNDS`.
    :param motion: a key of :data:`MOTIONS`.
    :param side: the longer side of the canvas in pixels.
    :param aspect: width and height as parts of the longer side.
    :param seconds: how long it lasts.
    :param fps: frames per second.
    :raises KeyError: for a colour, shape, size, background or motion that does not exist.
    """
    colour = colour or rng.choice(list(COLOURS))
    shape = shape or rng.choice(SHAPES)
    size = size or rng.choice(list(SIZES))
    background = background or rng.choice(list(BACKGROUNDS))
    motion = motion or rng.choice(list(MOTIONS))
    side = side or rng.randint(96, 256)
    aspect = aspect or rng.choices(ASPECTS, weights=(2, 1, 1))[0]
    # 4:2:0 video has one sample of colour for two by two pixels.
    width, height = (round(side * part / 2) * 2 for part in aspect)

    ground = Image.new("RGB", (width, height), jitter(rng, BACKGROUNDS[background]))
    paint = jitter(rng, COLOURS[colour])
    extent = round(min(width, height) * rng.uniform(*_EXTENTS[size]))
    stamp = mask(shape, extent)
    across, down = (
        _path(rng, room - extent, step) for room, step in zip((width, height), MOTIONS[motion], strict=True)
    )
    # One grain for the whole picture, like that of a paper; codecs would spend most of their bits on a fresh one.
    strength = rng.uniform(0, MAX_NOISE)
    grain = make_noise(rng, ground.size)
    count = max(1, round(seconds * fps))
    frames = []
    for number in range(count):
        passed = number / max(1, count - 1)
        frame = ground.copy()
        frame.paste(paint, (_place(across, passed), _place(down, passed)), stamp)
        frames.append(Image.blend(frame, grain, strength))
    return MovingDrawing(
        frames=tuple(frames),
        fps=fps,
        colour=colour,
        shape=shape,
        size=size,
        background=background,
        motion=motion,
    )


def encode(frames: Sequence[Image.Image], *, fps: float, crf: int = 18) -> bytes:
    """Frames as the bytes of an MP4 file (H.264, 4:2:0).

    :param frames: pictures of one size, even in width and height.
    :param fps: how many of them are shown in a second.
    :param crf: how much x264 may lose, from 0 (nothing) to 51.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread: with more, the bytes would depend on how many cores there are.
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1000),
            options={"crf": str(crf), "preset": "veryfast", "threads": "1"},
        )
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode(data: bytes) -> list[Image.Image]:
    """All frames of an MP4 file, as pictures."""
    import av

    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def _path(rng: random.Random, room: int, step: int) -> tuple[float, float]:
    """Where the shape is at first and at last along one axis that leaves it ``room`` pixels."""
    way = room * rng.uniform(*_WAY) * abs(step)
    low = rng.uniform(0, room - way)
    return (low, low + way) if step >= 0 else (low + way, low)


def _place(path: tuple[float, float], passed: float) -> int:
    return round(path[0] + (path[1] - path[0]) * passed)
