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

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.video_container import import_av

if TYPE_CHECKING:
    from PIL.Image import Image

# A part is a whole number of a clock's ticks, so that no reader sees the rate vary. The clock is as fine as all encoders
# take, unless a part is so long that its ticks would be more than MP4 can count.
_FINE, _COARSE = 60_000, 1_000
_LONG_S = 10_000
# Without pictures that refer to later ones, of which some readers lose the last; with little to look ahead at, as
# dozens of megabytes would wait there; and for readers that seek, a keyframe now and then.
_BEST_ENCODER = "libx264"
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
    :raises SampleError: ``media_unsupported``: the encoder does not take them.
    """
    av = import_av()
    ticks = _FINE if seconds / count < _LONG_S else _COARSE
    part = max(1, round(seconds * ticks / count))
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = _stream(av, container, size, part=part, ticks=ticks)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p", dst_colorspace=5)
            frame.pts, frame.time_base = number * part, Fraction(1, ticks)
            _encode(av, container, stream, frame)
        _encode(av, container, stream, None)
    return out.getvalue()


def _stream(av: Any, container: Any, size: tuple[int, int], *, part: int, ticks: int) -> Any:
    has_x264 = _BEST_ENCODER in av.codecs_available
    stream = container.add_stream(_BEST_ENCODER if has_x264 else "mpeg4", rate=Fraction(ticks, part))
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.options = dict(_X264 if has_x264 else _MPEG4)
    codec.time_base = Fraction(1, ticks)
    codec.thread_count = 2
    # What readers assume who don't look, and what the pictures are converted to.
    codec.colorspace, codec.color_range = _BT601, _TV_RANGE
    return stream


def _encode(av: Any, container: Any, stream: Any, frame: Any) -> None:
    """Encode a picture, None being the end. Apart, so that its errors are not taken for those of decoding."""
    try:
        container.mux(stream.encode(frame))
    except av.error.FFmpegError as error:
        size = f"{stream.width} x {stream.height}"
        raise SampleError(
            "media_unsupported",
            f"Its pictures can't be encoded as a clip of {size} pixels ({error.strerror}). Set max_pixels, or "
            "transport='frames'.",
        ) from error
