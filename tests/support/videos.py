"""Videos for tests, made on the spot. Every picture shows its own number, so that a test sees which one it got."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import FrameSampling, Media, MediaRef, Part

# The number's bits as black and white tiles, four in a row; they survive encoding, shrinking and 8 colours.
COLUMNS, ROWS = 4, 4
SIZE = (64, 64)
_CLOCK = 60_000


def numbered(number: int, size: tuple[int, int] = SIZE, *, noisy: bool = False) -> Image.Image:
    """Draw a number as black and white tiles; with noise, so that an encoder needs many bytes for it."""
    tiles = Image.new("L", (COLUMNS, ROWS))
    tiles.putdata([255 * (number >> bit & 1) for bit in range(COLUMNS * ROWS)])
    drawn = tiles.resize(size, Image.Resampling.NEAREST)
    return (Image.blend(drawn, Image.effect_noise(size, 100), 0.3) if noisy else drawn).convert("RGB")


def number_of(picture: Image.Image) -> int:
    """Read the number that :func:`numbered` drew."""
    width, height = picture.size
    gray = picture.convert("L")
    bits = 0
    for bit in range(COLUMNS * ROWS):
        row, column = divmod(bit, COLUMNS)
        place = (int((column + 0.5) * width / COLUMNS), int((row + 0.5) * height / ROWS))
        level = gray.getpixel(place)
        assert isinstance(level, int)
        bits |= (level > 127) << bit
    return bits


def video(
    frames: int = 20,
    *,
    fps: float = 10,
    times: Sequence[float] | None = None,
    last: float | None = None,
    start: float = 0.0,
    size: tuple[int, int] = SIZE,
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    gop: int = 10,
    b_frames: int = 2,
    rotation: int = 0,
    flipped: bool = False,
    sound: float = 0.0,
    shape: Fraction | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    pictures: Sequence[Image.Image] | None = None,
    noisy: bool = False,
    path: Path | None = None,
) -> bytes:
    """
    Encode a video.

    :param frames: How many pictures.
    :param times: When each begins, in seconds; evenly by ``fps`` without.
    :param last: How long the last picture is shown, in seconds.
    :param start: Added to all times.
    :param sound: Seconds of silence.
    :param rotation: Degrees, counterclockwise, by which players turn it.
    :param shape: Width to height of a pixel.
    :param path: Write it there first: some headers are only written last, or moved to the beginning, in a file.
    :param noisy: Make them large in bytes.
    :param pictures: What to show in place of numbers.
    """
    times = times or [number / fps for number in range(frames)]
    shown = pictures or [numbered(number, size, noisy=noisy) for number in range(len(times))]
    ends = [*times[1:], times[-1] + (last or 1 / fps)]
    out = io.BytesIO()
    with av.open(str(path) if path else out, "w", format=container, options=muxer or {}) as file:
        stream: Any = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.gop_size, context.max_b_frames = gop, b_frames
        # These containers' clock is the frame rate.
        context.time_base = (
            Fraction(1) / Fraction(fps).limit_denominator(1000)
            if container in ("avi", "mpeg")
            else Fraction(1, _CLOCK)
        )
        context.thread_count = 1
        if codec == "libx264":
            context.options = {
                "sc_threshold": "0",
                "preset": "ultrafast",
                "bf": str(b_frames),
                **(options or {}),
            }
        elif options:
            context.options = options
        if shape is not None:
            context.sample_aspect_ratio = shape
        if rotation or flipped:
            stream.set_display_rotation(rotation, hflip=flipped)
        silence = (
            file.add_stream("aac" if container in ("mp4", "mpegts", "flv") else "libopus", rate=48000)
            if sound
            else None
        )
        lengths: dict[int, int] = {}
        for image, time, end in zip(shown, times, ends, strict=True):
            if image.mode == "RGBA":
                frame = av.VideoFrame.from_bytes(image.tobytes(), *image.size).reformat(format=pixels)
            else:
                frame = av.VideoFrame.from_image(image).reformat(format=pixels)
            frame.pts = round((start + time) / context.time_base)
            lengths[frame.pts] = round((end - time) / context.time_base)
            frame.time_base = context.time_base
            _mux(file, stream.encode(frame), lengths)
        _mux(file, stream.encode(None), lengths)
        if silence is not None:
            _mux_silence(file, silence, start, sound)
    return path.read_bytes() if path else out.getvalue()


def _mux(file: Any, packets: Sequence[Any], lengths: dict[int, int]) -> None:
    for packet in packets:
        packet.duration = lengths.get(packet.pts, 0)
        file.mux(packet)


def _mux_silence(file: Any, stream: Any, start: float, seconds: float) -> None:
    context = stream.codec_context
    step = context.frame_size or 960
    for number in range(int(seconds * 48000 / step)):
        frame = av.AudioFrame(format=context.format.name, layout="stereo", samples=step)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate, frame.pts = 48000, round(start * 48000) + number * step
        frame.time_base = Fraction(1, 48000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def load(
    data: bytes | Path,
    frames: FrameSampling,
    *,
    as_video: bool = False,
    max_pixels: int | None = None,
) -> Sequence[Part]:
    """Fetch and prepare a video as a loader does, from an embedded one's bytes or a file."""
    loader, source = fetched(data, max_pixels=max_pixels)
    return loader.prepare(source, frames=frames, as_video=as_video)


def probe(data: bytes | Path) -> dict[str, Any]:
    loader, source = fetched(data)
    return dict(loader.probe(source))


def fetched(data: bytes | Path, *, max_pixels: int | None = None) -> tuple[MediaLoader, Any]:
    """Return a loader and the video as it fetched it."""
    if isinstance(data, Path):
        loader = MediaLoader(source_uri=f"file://{data.parent}/", max_pixels=max_pixels)
        return loader, loader.fetch(MediaRef("video", data.name))
    loader = MediaLoader(source_uri="file:///nowhere/", max_pixels=max_pixels)
    return loader, loader.fetch(MediaRef("video", "v"), embedded={"v": data})


def images_of(parts: Sequence[Part]) -> list[Image.Image]:
    """The pictures of a video that was prepared as frames."""
    return [Image.open(io.BytesIO(part.data)) for part in parts if isinstance(part, Media)]


def numbers(parts: Sequence[Part]) -> list[int]:
    """Which pictures a video was prepared as, whatever it was prepared as."""
    (kind,) = {part.kind for part in parts if isinstance(part, Media)}
    if kind == "image":
        return [number_of(image) for image in images_of(parts)]
    return [number for _, number in clip_numbers(clip_of(parts))]


def clip_of(parts: Sequence[Part]) -> bytes:
    """The bytes of a video that was prepared as one."""
    (clip,) = parts
    assert isinstance(clip, Media)
    assert (clip.kind, clip.mime) == ("video", "video/mp4")
    return clip.data


def clip_numbers(data: bytes) -> list[tuple[float, int]]:
    """When each picture of a clip begins, in seconds, and its number."""
    with av.open(io.BytesIO(data)) as file:
        return [(float(frame.time), number_of(frame.to_image())) for frame in file.decode(video=0)]
