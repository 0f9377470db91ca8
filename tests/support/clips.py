"""Clips as the engines are sent them: MP4 files whose every frame is to be looked at, each with its own time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from PIL import Image, ImageDraw

from airflow_vlm_provider.types import Media

COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "orange", "black")


def frames(count: int, *, size: tuple[int, int] = (96, 64), first: int = 0) -> list[Image.Image]:
    """Pictures of which each shows another colour and a bar at another place."""
    drawn = []
    for number in range(first, first + count):
        image = Image.new("RGB", size, COLOURS[number % len(COLOURS)])
        left = 8 * number % (size[0] - 16)
        ImageDraw.Draw(image).rectangle((left, 8, left + 15, size[1] - 8), fill="gray")
        drawn.append(image)
    return drawn


def clip(pictures: Sequence[Image.Image], *, times: Sequence[float], container: str = "mp4") -> Media:
    """A clip that shows each picture at its time, and the last one as long as the one before.

    :param times: In seconds, in milliseconds' precision.
    :param container: The format that holds it, whatever its MIME type says.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream("libx264", rate=1000, options={"crf": "0", "bf": "0"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * time)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return Media("video", "video/mp4", buffer.getvalue(), "clip.mp4")
