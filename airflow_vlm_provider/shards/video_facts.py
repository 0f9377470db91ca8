"""What a video is like, found out without decoding it: how long it lasts, and how many pictures it has a second.

Times are seconds from the video's first picture on, wherever the file's own clock begins.

MP4 and GIF have a table of all pictures. Others say how long they last for the file as a whole, or, as streams do, not
at all. So the last packets are looked at, and sound that goes on after the last picture does not count. Where a file
ends well before its header says so, the header is believed: what is asked of the missing end is then an error. A
stream that was cut short, and says nowhere how long it was to be, can't be told from one that ended there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.video_container import import_av, open_video, seconds

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from airflow_vlm_provider.shards.video_files import VideoFile

# The index of other containers is a hint, and the number of pictures that they tell may count empty ones.
_WITH_TABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "gif"})
# Rates beyond this are mostly a clock's resolution, not a number of pictures.
_MOST_FPS = 500.0
_GUESSED_FPS = 25.0
# Where packets aren't in the order of their times, the last one is not the last picture's.
_TAIL_S, _TAIL_FRAMES = 2.0, 16
# How much of a video's end may be missing: headers are rounded, and sound is padded.
_LEAST_SLACK_FRAMES = 2
_SLACK_SHARE = 0.05
_MOST_SLACK_S = 10.0


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a video's file tells about it.

    :param start: Time of the first picture by the file's own clock, in seconds.
    :param duration: Seconds from there to the end of the last.
    :param fps: Pictures per second, on average.
    :param frames: How many pictures there are; 0 when the file does not say.
    """

    start: float
    duration: float
    fps: float
    frames: int

    @property
    def slack(self) -> float:
        """How many seconds may be missing at the end without anybody minding."""
        return _slack(self.duration, self.fps)


def video_facts(file: VideoFile) -> VideoFacts:
    """
    Tell what a video is like. Found out once for a file, however many windows of it are looked at.

    :raises SampleError: as :func:`~airflow_vlm_provider.shards.video_container.open_video`; also ``media_corrupt``
        when there are no pictures.
    """
    with file.lock:
        if file.facts is None:
            file.facts = _facts(file)
        facts: VideoFacts = file.facts
    return facts


def _facts(file: VideoFile) -> VideoFacts:
    with open_video(file) as (container, stream):
        has_table = container.format.name in _WITH_TABLE and stream.frames > 0
        start = seconds(stream.start_time, stream.time_base)
        declared = _declared(container, stream, has_table=has_table)
        fps = _fps(stream)
        ends = _Ends()
        if declared is not None and start is not None and stream.time_base:
            own = seconds(stream.duration, stream.time_base) or declared
            # Where it can't be sought, what is read is the rest, or nothing.
            with contextlib.suppress(import_av().error.FFmpegError):
                tail = start + own - max(_TAIL_S, _TAIL_FRAMES / fps)
                container.seek(int(tail / stream.time_base), stream=stream)
            ends = _ends(container, stream, fps)
    if ends.video is None and not (has_table and declared):
        with open_video(file) as (container, stream):
            ends = _ends(container, stream, fps)
        if ends.video is None:
            raise SampleError("media_corrupt", "The video has no pictures.")
    start = start if start is not None else ends.first or 0.0
    own = duration = 0.0 if ends.video is None else ends.video - start
    if declared is not None:
        # Some containers count from their first picture on, others from their clock's beginning.
        reached = own if ends.any is None else max(ends.any, ends.any - start)
        if reached < declared - _slack(declared, fps):
            duration = declared
        elif has_table:
            # Its lengths are times between decoding. Only their sum says something about the last picture's.
            last = 0.0 if ends.last is None else ends.last - start
            duration = declared if declared > last else last + 1 / fps
    frames = stream.frames if has_table else 0
    return VideoFacts(start=start, duration=max(duration, 1 / fps), fps=fps, frames=frames)


def _declared(container: InputContainer, stream: VideoStream, *, has_table: bool) -> float | None:
    """How long the video is, or the whole file where it has no table of the video's pictures."""
    if has_table:
        return seconds(stream.duration, stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


def _fps(stream: VideoStream) -> float:
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return next((float(rate) for rate in rates if rate is not None and 0 < rate <= _MOST_FPS), _GUESSED_FPS)


def _slack(duration: float, fps: float) -> float:
    return max(_LEAST_SLACK_FRAMES / fps, min(_SLACK_SHARE * duration, _MOST_SLACK_S))


@dataclass(slots=True)
class _Ends:
    """By the file's own clock, in seconds: where the stream's first and last packet begin, where its packets end, and where any end."""

    first: float | None = None
    last: float | None = None
    video: float | None = None
    any: float | None = None


def _ends(container: InputContainer, stream: VideoStream, fps: float) -> _Ends:
    """Read packets to the file's end."""
    ends = _Ends()
    # A file that is cut short ends in an error.
    with contextlib.suppress(import_av().error.FFmpegError):
        for packet in container.demux():
            at = seconds(packet.dts if packet.pts is None else packet.pts, packet.time_base)
            if at is None or not packet.size or packet.is_discard:
                continue
            length = seconds(packet.duration, packet.time_base) or 0.0
            ends.any = max(at + length, at if ends.any is None else ends.any)
            if packet.stream_index == stream.index:
                end = at + (length or 1 / fps)
                ends.first = at if ends.first is None else min(ends.first, at)
                ends.last = at if ends.last is None else max(ends.last, at)
                ends.video = end if ends.video is None else max(ends.video, end)
    return ends
