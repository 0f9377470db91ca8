"""Decoded pictures of a video, made upright, square in their pixels, opaque and small enough.

The conventions are those of images (:mod:`airflow_vlm_provider.shards.images`): transparency becomes white, nothing is
enlarged, colours become RGB without regard to profiles. Interlaced pictures stay as they are.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.images import JPEG_QUALITY, shrunk_size
from airflow_vlm_provider.shards.video_container import check_size, import_av

if TYPE_CHECKING:
    from fractions import Fraction

    from av.video.frame import VideoFrame
    from PIL.Image import Image

# libav's names of the matrices between colours and brightness.
_UNSPECIFIED, _BT709, _BT601 = 2, 1, 5
# From this height on, players take colours for HDTV's when the file does not say.
_HD_HEIGHT = 720
# Beyond this, a pixel's shape is a mistake.
_MOST_STRETCHED = 8


class Pictures:
    """Makes pictures of one video's frames. For one thread.

    :param shape: Width to height of a pixel, as the container tells; None is square.
    :param max_pixels: Most pixels of a picture; None keeps the size.
    :param even: Make both sides even, as video codecs need it.
    """

    def __init__(self, *, shape: Fraction | None, max_pixels: int | None, even: bool = False) -> None:
        self._shape = _plausible(shape)
        self._max_pixels = max_pixels
        self._even = even
        # One for all, because it keeps its tables.
        self._scaler: Any = import_av().video.reformatter.VideoReformatter()

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """The size, upright, that :meth:`picture` makes of a frame."""
        width, height = self._size(frame)
        return (height, width) if _turn(frame) in _SIDEWAYS else (width, height)

    def picture(self, frame: VideoFrame, *, size: tuple[int, int] | None = None) -> Image:
        """
        Make a picture of a frame.

        :param size: Its size, where it is not to follow from the frame's.
        :raises SampleError: ``media_too_large``
        """
        from PIL import Image

        check_size(frame.width, frame.height)
        turn = _turn(frame)
        if size is None:
            width, height = self._size(frame)
        else:
            width, height = size[::-1] if turn in _SIDEWAYS else size
        clear = frame.format.name.startswith("pal8") or any(each.is_alpha for each in frame.format.components)
        mode, pixels = ("RGBA", "rgba") if clear else ("RGB", "rgb24")
        matrix = None
        if frame.colorspace == _UNSPECIFIED:
            matrix = _BT709 if frame.height >= _HD_HEIGHT else _BT601
        plane = self._scaler.reformat(
            frame, width=width, height=height, format=pixels, src_colorspace=matrix, interpolation="LANCZOS"
        ).planes[0]
        image = Image.frombuffer(mode, (width, height), bytes(plane), "raw", mode, plane.line_size, 1)
        if clear:
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image.getchannel("A"))
            image = white
        return image if turn is None else image.transpose(turn)

    def _size(self, frame: VideoFrame) -> tuple[int, int]:
        """The size before a picture is turned upright."""
        width, height = frame.width, frame.height
        # Never enlarged: the other side gives way.
        if self._shape > 1:
            height = max(1, round(height / self._shape))
        elif self._shape < 1:
            width = max(1, round(width * self._shape))
        if self._max_pixels is not None:
            width, height = shrunk_size((width, height), self._max_pixels)
        if self._even:
            width, height = max(2, width // 2 * 2), max(2, height // 2 * 2)
        return width, height


def jpeg(image: Image) -> bytes:
    """Encode a picture as images are."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return out.getvalue()


def is_upright(frame: VideoFrame) -> bool:
    """Whether a frame is shown as it is stored."""
    return _turn(frame) is None


def _plausible(shape: Fraction | None) -> float:
    if shape is None or not 1 / _MOST_STRETCHED <= shape <= _MOST_STRETCHED:
        return 1.0
    return float(shape)


# Pillow's Transpose, by number: its import is heavy.
_FLIP_LEFT_RIGHT, _FLIP_TOP_BOTTOM, _ROTATE_90, _ROTATE_180, _ROTATE_270, _TRANSPOSE, _TRANSVERSE = range(7)
_TINY = 16
_SIDEWAYS = frozenset({_ROTATE_90, _ROTATE_270, _TRANSPOSE, _TRANSVERSE})


def _turn(frame: VideoFrame) -> Any:
    """What makes a frame upright, as Pillow's Transpose; None when it is already. Rotations by other than right angles go to the nearest."""
    # PyAV has a frame and its side data refer to each other: until Python collects its garbage, they stay in memory,
    # which is no matter of a tiny copy.
    tiny = (
        import_av()
        .video.reformatter.VideoReformatter()
        .reformat(frame, width=_TINY, height=_TINY, format="gray", interpolation="POINT")
    )
    data: Any = tiny.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    # A point (x, y), with y downwards, is shown at (ax + cy, bx + dy).
    if abs(a) + abs(d) >= abs(b) + abs(c):
        straight = {(False, False): None, (True, False): _FLIP_LEFT_RIGHT, (False, True): _FLIP_TOP_BOTTOM}
        return straight.get((a < 0, d < 0), _ROTATE_180)
    return {(False, True): _ROTATE_270, (True, False): _ROTATE_90, (False, False): _TRANSPOSE}.get(
        (b < 0, c < 0), _TRANSVERSE
    )
