"""Videos made fit for a model: some pictures of them, as one clip or as one image each.

Which pictures: the time span, cut at the video's end, is divided into equal parts, and of each part the picture in its
middle is taken. There are as many parts as ``fps`` pictures a second make, rounded, but at least one, at most
``max_frames``, and no more than the video has pictures. For a clip the number is rounded down, to an even one: vLLM
looks at as many pictures of a clip as its model's own rate makes, in pairs, and would pass over one at its end. A clip
has at least two, because OpenCV reads nothing of one that has a single picture; that one is then there twice.

A video that is fit already is sent as it is: an MP4 with H.264, upright, asked for from beginning to end, with no more
pictures than would be taken, no larger than ``max_pixels`` and :data:`MAX_UNTOUCHED_BYTES`. Of every other one, a clip
is made, or JPEGs as of images.

A still GIF is a video of one picture; other images are ``media_unsupported`` here, as is a file without pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.video_clip import encode_clip
from airflow_vlm_provider.shards.video_facts import VideoFacts
from airflow_vlm_provider.shards.video_frames import VideoFrames, open_frames
from airflow_vlm_provider.shards.video_pictures import Pictures, is_upright, jpeg
from airflow_vlm_provider.types import FrameSampling, Media, Part

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    from airflow_vlm_provider.shards.video_files import VideoFile

# To be raised whenever of the same video other pictures would be taken, or they would come out otherwise, or the words
# before them change: it is part of what identifies an answer.
VIDEO_VERSION = 1
MAX_UNTOUCHED_BYTES = 16 * 1024 * 1024


def probe_video(file: VideoFile) -> Mapping[str, Any]:
    """
    Tell what a video is like; see :class:`~airflow_vlm_provider.types.Probe`. Its first picture is decoded.

    :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
    :raises TransientError: the file was written to since it was fetched, or could not be read.
    :raises ConfigError: PyAV is not installed.
    """
    with open_frames(file) as frames:
        (first,) = frames.at([0.0])
        width, height = _pictures(frames, None).size(first)
    facts = frames.facts
    return {
        "duration": round(facts.duration, 3),
        "width": width,
        "height": height,
        "fps": round(facts.fps, 3),
    }


def prepare_video(
    file: VideoFile, *, ref: str, frames: FrameSampling, as_video: bool, max_pixels: int | None
) -> Sequence[Part]:
    """
    Make a video fit for a model; see the module's text.

    :param ref: The reference that it was loaded from.
    :param max_pixels: Most pixels of a picture; None keeps the size.
    :return: One video, or a text that says what follows, and images.
    :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
    :raises TransientError: the file was written to since it was fetched, or could not be read.
    :raises ConfigError: PyAV is not installed.
    """
    with open_frames(file) as video:
        start, end = _span(frames, video.facts)
        wanted = _count(frames, end - start)
        count = min(wanted, _most_pictures(video.facts, end - start))
        if as_video:
            count = _pairs(frames, end - start, count)
        times = sample_times(start, end, count)
        taken = video.at(times)
        if not as_video:
            pictures = _pictures(video, max_pixels)
            images = [Media("image", "image/jpeg", jpeg(pictures.picture(frame)), ref) for frame in taken]
            return _said(start, end, times), *images
        first = next(taken)
        whole = start == 0 and end == video.facts.duration
        if whole and _is_fit(file, video, first, wanted=wanted, max_pixels=max_pixels):
            # Nothing is sent whose end is missing.
            for _ in taken:
                pass
            data = file.read(file.size, 0)
        else:
            data = _clip(video, first, taken, seconds=end - start, count=len(times), max_pixels=max_pixels)
        return (Media("video", "video/mp4", data, ref),)


def sample_times(start: float, end: float, count: int) -> list[float]:
    """Return the middles of equal parts of a time span, in seconds."""
    part = (end - start) / count
    return [start + (number + 0.5) * part for number in range(count)]


def _span(frames: FrameSampling, facts: VideoFacts) -> tuple[float, float]:
    start = max(0.0, frames.start)
    end = facts.duration if frames.end is None else min(frames.end, facts.duration)
    if start >= end:
        raise SampleError(
            "media_corrupt",
            f"The video lasts {facts.duration:.1f} seconds; there is nothing from second {start:.1f} on.",
        )
    return start, end


def _count(frames: FrameSampling, seconds: float) -> int:
    return max(1, min(frames.max_frames, math.floor(seconds * frames.fps + 0.5)))


def _pairs(frames: FrameSampling, seconds: float, count: int) -> int:
    """How many pictures a clip has: in pairs, and no faster than was asked for."""
    # Times are no whole numbers of anything: what is a hair too little is meant.
    slow = math.floor(seconds * frames.fps + 1e-3)
    return max(2, min(count, slow) // 2 * 2)


def _most_pictures(facts: VideoFacts, seconds: float) -> int:
    """How many pictures there are to be seen in so many seconds, for all that is known."""
    return max(1, min(facts.frames or math.inf, math.ceil(seconds * facts.fps)))  # type: ignore[return-value]


def _pictures(video: VideoFrames, max_pixels: int | None, *, even: bool = False) -> Pictures:
    return Pictures(shape=video.stream.sample_aspect_ratio, max_pixels=max_pixels, even=even)


def _clip(
    video: VideoFrames,
    first: VideoFrame,
    rest: Iterator[VideoFrame],
    *,
    seconds: float,
    count: int,
    max_pixels: int | None,
) -> bytes:
    pictures = _pictures(video, max_pixels, even=True)
    size = pictures.size(first)

    def all_pictures() -> Iterator[Any]:
        yield pictures.picture(first, size=size)
        for frame in rest:
            yield pictures.picture(frame, size=size)

    return encode_clip(all_pictures(), size=size, seconds=seconds, count=count)


def _is_fit(
    file: VideoFile, video: VideoFrames, first: VideoFrame, *, wanted: int, max_pixels: int | None
) -> bool:
    stream, codec = video.stream, video.stream.codec_context
    brand = video.container.metadata.get("major_brand", "qt")
    return (
        file.size <= MAX_UNTOUCHED_BYTES
        and video.container.format.name.startswith("mov,mp4")
        and not brand.startswith("qt")
        and codec.name == "h264"
        and codec.pix_fmt in ("yuv420p", "yuvj420p")
        and 1 < video.facts.frames <= wanted
        and is_upright(first)
        and (stream.sample_aspect_ratio or 1) == 1
        and (max_pixels is None or first.width * first.height <= max_pixels)
    )


def _said(start: float, end: float, times: Sequence[float]) -> str:
    if len(times) == 1:
        return f"The following image is a frame of a video, at second {_shown(times[0])}."
    return (
        f"The following {len(times)} images are frames of one video, in order and evenly spread from second "
        f"{_shown(start)} to second {_shown(end)}."
    )


def _shown(seconds: float) -> str:
    return f"{seconds:.1f}".removesuffix(".0")
