"""The pictures that a video shows at given times, decoding as few others as possible.

The picture at a time is the last one that begins at or before it, as a player shows it, whatever the frame rate does;
before the first picture, it is the first.

What lies between two times is passed over in the cheapest way: by seeking, once keyframes turn out to be closer than
what is to be passed; else by decoding on without the pictures that no other one refers to. At no time are more than a
few decoded pictures held.

Invariant: a picture that is missing is never silently replaced by one of quite another time. Where a file is cut short
or damaged so that what was shown at a time can't be decoded, it is ``media_corrupt``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.video_container import import_av, open_video, seconds
from airflow_vlm_provider.shards.video_facts import VideoFacts, video_facts

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from airflow_vlm_provider.shards.video_files import VideoFile

# A decoder holds up to 16 pictures that others refer to, and one more for every thread. Dozens of videos may be
# prepared at once, so only as many are decoded at a time as there are processors to do it, and never more than four:
# of 1080p, 4 x 20 pictures are 250 MB. Larger ones are decoded one at a time.
_PROCESSORS = os.cpu_count() or 1
DECODERS = min(4, _PROCESSORS)
_big = threading.Lock()
BIG_PIXELS = 2304 * 1296
_MOST_THREADS = 4

# Closer than this, decoding on is cheaper than seeking, which may take a dozen reads.
_LEAST_SEEK_S = 1.0
# How far before a time to seek when what can be decoded from there on begins after it: not every container is sought
# by keyframes, indexes are wrong, and keyframes are none.
_EARLIER_S = (1.0, 3.0, 10.0, 100.0)
# Of two times that are equal, one comes out a little greater by reckoning.
_EQUAL_S = 1e-6
# Times in some containers are whole milliseconds.
_ROUNDING_S = 0.002
# What was recorded in the middle of something begins with what nobody can decode.
_MOST_LOST_AT_START_S = 2.0
# Some codecs have packets that only others refer to.
_MOST_WITHOUT_PICTURE = 2
# Codecs with pictures that no other one refers to, whose decoders can leave them out.
_SKIPPABLE = frozenset({"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vc1", "wmv3"})
# A file of a few megabytes can hold weeks of pictures. This is ten hours of 720p with a single keyframe. Every packet
# counts as some pixels, for what it costs to look at.
MAX_PASSED_PIXELS = 10**12
_PACKET_PIXELS = 100_000


class _Turns:
    """Bounds how many videos are decoded at once."""

    def __init__(self, most: int) -> None:
        self._places = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()
        self._busy = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Wait for a turn; tells whether nobody else has one just now."""
        with self._places:
            with self._lock:
                self._busy += 1
                alone = self._busy == 1
            try:
                yield alone
            finally:
                with self._lock:
                    self._busy -= 1


_turns = _Turns(DECODERS)


@contextlib.contextmanager
def open_frames(file: VideoFile) -> Iterator[VideoFrames]:
    """
    Open a video to decode pictures, when it is its turn.

    :raises SampleError: as :func:`~airflow_vlm_provider.shards.video_container.open_video`.
    """
    with _turns.turn() as alone:
        facts = video_facts(file)
        with open_video(file) as (container, stream):
            codec = stream.codec_context
            big = codec.width * codec.height > BIG_PIXELS
            # Several decoders of one thread do more than one of several, and a lone one may have all processors.
            codec.thread_type = "AUTO"
            codec.thread_count = min(_MOST_THREADS, _PROCESSORS) if big or alone else 1
            with _big if big else contextlib.nullcontext():
                yield VideoFrames(container, stream, facts)


class VideoFrames:
    """Decodes a video's pictures. For one thread.

    :ivar facts: What is known of the video.
    :ivar decoded: Packets that were decoded so far.
    """

    _shown: VideoFrame | None
    _next: VideoFrame | None
    _pictures: deque[VideoFrame]
    _from_start: bool
    _flushed: bool
    _sought: bool
    _keyframe: float | None
    _left_out: float
    _sent: deque[float]
    _latest: float

    def __init__(self, container: InputContainer, stream: VideoStream, facts: VideoFacts) -> None:
        self.facts = facts
        self.decoded = 0
        self.container = container
        self.stream = stream
        self._libav_error = import_av().error.FFmpegError
        self._may_skip = stream.codec_context.name in _SKIPPABLE
        self._pixels_left = MAX_PASSED_PIXELS
        self._gop = self._back = 0.0
        self._forget(from_start=True)

    def at(self, times: Sequence[float]) -> Iterator[VideoFrame]:
        """
        Yield the picture at each time, in seconds, ascending; one that is shown for long comes more than once.

        :raises SampleError: ``media_corrupt``: it is missing. ``media_too_large``: too much is in the way.
        """
        position = 0.0
        for time in times:
            # Keyframes that were never farther apart are not now, either; before any was met, it can only be tried.
            self._sought = (
                (not position or self._gop > 0) and self._is_far(time - position) and self._seek(time)
            )
            self._reach(time)
            if self._shown is not None and self._left_out > self._time(self._shown):
                # What was left out is the one: the durations in this file are not to be relied on.
                self._may_skip = False
                self._seek(time)
                self._reach(time)
            yield self._checked(time)
            position = time

    def _reach(self, time: float) -> None:
        """Decode up to a time, from where decoding is or from further back."""
        self._advance(time)
        for back in _EARLIER_S:
            if self._shown is not None or self._from_start:
                return
            if back > self._back:
                # Whatever the reason, it will be the same for the next time.
                self._back, self._sought = back, True
                self._seek(time)
                self._advance(time)
        if self._shown is None and not self._from_start:
            self._seek(0.0)
            self._from_start = self._sought = True
            self._advance(time)

    def _advance(self, time: float) -> None:
        while self._next is None or self._time(self._next) <= time + _EQUAL_S:
            if self._next is not None:
                self._shown, self._next = self._next, None
                begins = self._time(self._shown)
                while self._sent and self._sent[0] <= begins:
                    self._sent.popleft()
            if not self._decode_next(time):
                return

    def _decode_next(self, time: float) -> bool:
        """Decode the next picture; False when there is none any more."""
        while not self._pictures:
            packet = self._read()
            if packet is None:
                if self._flushed:
                    return False
                self._flushed = True
                self._take(None)
            elif not self._is_far_before(packet, time) and (self._from_start or self._keyframe is not None):
                self._decode(packet, time)
        self._next = self._pictures.popleft()
        return True

    def _read(self) -> Packet[VideoStream] | None:
        try:
            # Packets without bytes mean the end to a decoder, wherever they stand.
            return next((packet for packet in self._packets if packet.size), None)
        except self._libav_error:
            # The file ends here; what is missing is told by the times that are asked for.
            return None

    def _is_far_before(self, packet: Packet[VideoStream], time: float) -> bool:
        """Whether there is a better keyframe to go on from; if so, decoding goes on there."""
        at = self._packet_time(packet)
        if at is None or not packet.is_keyframe:
            return False
        if self._keyframe is not None:
            self._gop = max(self._gop, at - self._keyframe)
        self._keyframe = at
        if not self._gop or self._sought or not self._is_far(time - at):
            return False
        self._sought = self._seek(time)
        return self._sought

    def _is_far(self, seconds: float) -> bool:
        """Whether there must be a keyframe on such a way, for which it is worth seeking."""
        return seconds > max(self._gop, _LEAST_SEEK_S)

    def _decode(self, packet: Packet[VideoStream], time: float) -> None:
        at, length = self._packet_time(packet), seconds(packet.duration, packet.time_base)
        unseen = bool(self._may_skip and at is not None and length and at + length + _ROUNDING_S <= time)
        self.stream.codec_context.skip_frame = "NONREF" if unseen else "DEFAULT"
        if unseen and at is not None:
            self._left_out = max(self._left_out, at)
        if at is not None:
            self._sent.append(at)
        self._take(packet)

    def _take(self, packet: Packet[VideoStream] | None) -> None:
        """Have a packet decoded, None being the end."""
        codec = self.stream.codec_context
        self.decoded += 1
        self._pixels_left -= max(codec.width * codec.height, _PACKET_PIXELS)
        if self._pixels_left < 0:
            raise SampleError(
                "media_too_large",
                "The video has too many pictures between those that are looked at, and hardly a keyframe among them. "
                "Encode it with a keyframe every few seconds.",
            )
        try:
            frames = codec.decode(packet)
        except EOFError:
            return
        except self._libav_error as error:
            if isinstance(error, (MemoryError, NotImplementedError)):
                raise
            return
        for frame in frames:
            self._give_time(frame)
            # Else made up from what was lost of it.
            if not frame.is_corrupt:
                self._pictures.append(frame)

    def _checked(self, time: float) -> VideoFrame:
        """Return the picture that is shown, if it is the right one."""
        facts, shown, following = self.facts, self._shown, self._next
        if shown is None:
            if following is None:
                raise SampleError("media_corrupt", "None of the video's pictures can be decoded.")
            missing = self._time(following) - time
            if missing > max(facts.slack, _MOST_LOST_AT_START_S):
                raise SampleError(
                    "media_corrupt", f"The video's first {missing:.1f} seconds can't be decoded."
                )
            return following
        begins = self._time(shown)
        ends = begins + (seconds(shown.duration, shown.time_base) or 1 / facts.fps)
        if following is None and time - ends > facts.slack:
            raise SampleError(
                "media_corrupt",
                f"The video is cut short: it ends after {ends:.1f} of {facts.duration:.1f} seconds, and second "
                f"{time:.1f} was asked for.",
            )
        lost = sum(begins < at <= time for at in self._sent)
        if lost > _MOST_WITHOUT_PICTURE and time - ends > facts.slack:
            raise SampleError(
                "media_corrupt", f"The video is damaged: it can't be decoded around second {time:.1f}."
            )
        return shown

    def _seek(self, time: float) -> bool:
        """Go to the last keyframe before a time; False when the file can't be sought."""
        base = self.stream.time_base
        assert base is not None
        try:
            place = self.facts.start + max(time - self._back, 0.0)
            self.container.seek(int(place / base), stream=self.stream)
        except self._libav_error:
            return False
        self._forget(from_start=False)
        return True

    def _forget(self, *, from_start: bool) -> None:
        """Begin anew wherever the container is."""
        self._from_start = from_start
        self._packets = self.container.demux(self.stream)
        self._pictures = deque()
        self._shown = None
        self._next = None
        self._keyframe = None
        self._flushed = False
        self._sent = deque()
        self._left_out = self._latest = float("-inf")

    def _packet_time(self, packet: Packet[VideoStream]) -> float | None:
        at = seconds(packet.pts, packet.time_base)
        return None if at is None else at - self.facts.start

    def _time(self, frame: VideoFrame) -> float:
        at = seconds(frame.pts, frame.time_base)
        assert at is not None
        return at - self.facts.start

    def _give_time(self, frame: VideoFrame) -> None:
        """Have a frame without a time, as AVI's are, shown when it was to be decoded, or after the one before it."""
        base = self.stream.time_base
        assert base is not None
        if frame.time_base is None:
            frame.time_base = base
        if frame.pts is None:
            frame.pts = frame.dts
        if frame.pts is None:
            latest = self._latest + 1 / self.facts.fps if self._latest >= 0 else 0.0
            frame.pts = int((self.facts.start + latest) / frame.time_base)
        self._latest = self._time(frame)
