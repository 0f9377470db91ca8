"""A clip of a video for a model: sampled pictures as an MP4 that plays for as long as what they are from.

Every picture is shown for an equal part of the time, the part that it was taken from the middle of. So at each time
that was sampled, the clip shows what the video shows, and a model that tells seconds by the clip is right to half of
such a part. The rate is the same throughout, because readers make seconds of a picture's number and the rate.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.video_container import import_av

if TYPE_CHECKING:
    from PIL.Image import Image

# MP4's usual clock. A part is a whole number of its ticks, so that no reader sees the rate vary.
_TICKS_PER_S = 90_000
# Without pictures that refer to later ones, of which some readers lose the last; with little to look ahead at, as
# dozens of megabytes would wait there; and for readers that seek, a keyframe now and then.
_X264 = {"preset": "fast", "crf": "18", "bf": "0", "rc-lookahead": "4", "g": "16"}
_MPEG4 = {"qscale": "2", "g": "16"}
_BT601, _TV_RANGE = 6, 1


def encode_clip(pictures: Iterable[Image], *, size: tuple[int, int], seconds: float, count: int) -> bytes:
    """
    Encode pictures as they come.

    :param pictures: All of a size, with even sides.
    :param size: Their size.
    :param seconds: How long the clip plays.
    :param count: How many pictures there are.
    """
    av = import_av()
    part = max(1, round(seconds * _TICKS_PER_S / count))
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = _stream(av, container, size, Fraction(_TICKS_PER_S, part))
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p", dst_colorspace=5)
            frame.pts, frame.time_base = number * part, Fraction(1, _TICKS_PER_S)
            _mux(container, stream.encode(frame), part)
        _mux(container, stream.encode(None), part)
    return out.getvalue()


def _stream(av: Any, container: Any, size: tuple[int, int], rate: Fraction) -> Any:
    has_x264 = "libx264" in av.codecs_available
    stream = container.add_stream("libx264" if has_x264 else "mpeg4", rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.options = dict(_X264 if has_x264 else _MPEG4)
    codec.time_base = Fraction(1, _TICKS_PER_S)
    codec.thread_count = 2
    # What readers assume who don't look, and what the pictures are converted to.
    codec.colorspace, codec.color_range = _BT601, _TV_RANGE
    return stream


def _mux(container: Any, packets: Iterable[Any], part: int) -> None:
    for packet in packets:
        # The last picture's is nowhere else to be seen.
        packet.duration = int(part / _TICKS_PER_S / packet.time_base)
        container.mux(packet)
