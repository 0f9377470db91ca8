"""What an image file is, told by its bytes alone: format, completeness, size. Nothing is decoded here.

Pillow is asked for what its lazy opening tells cheaply and safely. What it does not tell is read here:
whether a PNG is whole (Pillow looks no further than the first pixels) and how large a WebP is (older Pillows
allocate the whole canvas before anyone can look at its size).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from airflow_vlm_provider.errors import SampleError

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]

# First bytes of the formats that are read.
_MAGIC: tuple[tuple[bytes, ImageFormat], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"BM", "BMP"),
)

# What else turns up under an image's name: offset, bytes, and what the message says.
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\0\0\1\0", "a Windows icon"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "gzip-compressed data"),
)

_REMEDY = "convert it to JPEG, PNG, WebP, GIF, BMP or TIFF."


def image_format(data: bytes) -> ImageFormat:
    """
    Tell the format by the first bytes; names and declared types are not to be trusted.

    :raises SampleError: ``media_corrupt`` when this is no image at all, ``media_unsupported`` when it is of
        another known kind.
    """
    for magic, found in _MAGIC:
        if data.startswith(magic):
            return found
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise SampleError("media_corrupt", "The image is empty: it has no bytes.")
    for offset, magic, name in _OTHERS:
        if data.startswith(magic, offset):
            raise SampleError("media_unsupported", f"It is {name}; {_REMEDY}")
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        raise SampleError("media_unsupported", f"It is an SVG drawing; {_REMEDY}")
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise SampleError("media_corrupt", "It is not an image but an HTML page, an error page perhaps.")
    what = "text" if _is_text(data[:512]) else f"unknown (it begins with {data[:8].hex(' ')})"
    raise SampleError("media_corrupt", f"It is not an image: its content is {what}.")


def _is_text(data: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 or byte > 126 for byte in data)


def jpeg_is_whole(data: bytes, scan: int) -> bool:
    """
    Tell whether a JPEG has its end-of-image marker.

    :param scan: Where the first scan's data begin. Before it the marker may stand in an embedded thumbnail;
        after it the pair FF D9 cannot be pixels, because the encoding escapes every FF.
    """
    # Nearly all end here; some writers pad with zeros, and phones append whole videos.
    return data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", scan) >= 0


@dataclass(frozen=True, slots=True)
class PngHeader:
    """What a PNG's chunks tell.

    :param plain: One still picture of at most 8 bits a channel, without transparency.
    :param exif: It carries EXIF data, and so perhaps an orientation.
    """

    size: tuple[int, int]
    plain: bool
    exif: bool


def read_png(data: bytes) -> PngHeader:
    """
    Walk a PNG's chunks from the first to the last, checking lengths and the checksums of critical ones.

    :raises SampleError: ``media_corrupt``
    """
    view = memoryview(data)
    header: tuple[int, int, int, int] | None = None
    kinds: set[bytes] = set()
    offset = 8
    while b"IEND" not in kinds:
        if offset + 12 > len(data):
            raise SampleError("media_corrupt", "The PNG is cut short: its last chunk (IEND) is missing.")
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        if end > len(data):
            raise SampleError("media_corrupt", f"The PNG is cut short within a chunk of {length} bytes.")
        # A capital first letter marks a chunk that the picture depends on.
        if kind[:1].isupper():
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(view[offset + 4 : end - 4]) != checksum:
                raise SampleError("media_corrupt", "The PNG is damaged: a chunk's checksum is wrong.")
        # Exactly one header, and first: of two, a decoder may believe the one that was not looked at.
        if (kind == b"IHDR") != (header is None) or (header is None and length != 13):
            raise SampleError("media_corrupt", "The PNG is damaged: it does not begin with its one header.")
        if header is None:
            header = struct.unpack_from(">IIBB", data, offset + 8)
        kinds.add(kind)
        offset = end
    assert header is not None
    width, height, depth, colour = header
    if not width or not height or b"IDAT" not in kinds:
        raise SampleError("media_corrupt", "The PNG has no pixels.")
    # Colour types 0, 2 and 3 are gray, RGB and palette; 4 and 6 have an alpha channel.
    plain = depth <= 8 and colour in (0, 2, 3) and not kinds & {b"tRNS", b"acTL"}
    return PngHeader((width, height), plain, b"eXIf" in kinds)


@dataclass(frozen=True, slots=True)
class WebpHeader:
    """What a WebP's header tells.

    :param plain: One still picture without transparency.
    :param exif: It carries EXIF data, and so perhaps an orientation.
    """

    size: tuple[int, int]
    plain: bool
    exif: bool


def read_webp(data: bytes) -> WebpHeader:
    """
    Read a WebP's header and compare the declared length with the actual one.

    :raises SampleError: ``media_corrupt``
    """
    if len(data) < 30 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise SampleError("media_corrupt", "The WebP is cut short: it has fewer bytes than its header says.")
    kind = data[12:16]
    if kind == b"VP8X":
        flags = data[20]
        size = (1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
        alpha, exif, animation = flags & 0x10, flags & 0x08, flags & 0x02
        return WebpHeader(size, not alpha and not animation, bool(exif))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return WebpHeader((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)), not bits >> 28 & 1, False)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return WebpHeader((width & 0x3FFF, height & 0x3FFF), True, False)
    raise SampleError("media_corrupt", "The WebP is damaged: its header can't be read.")
