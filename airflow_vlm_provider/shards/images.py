"""Images made fit for a model: whole, upright, opaque, 8 bits a channel, no larger than asked.

An image that is fit already keeps its bytes and is not even decoded. That is a JPEG, PNG or WebP with one
picture in gray, RGB or a palette, without transparency and without a rotation in its EXIF data. Every other one
is decoded and encoded anew:

- rotated as its EXIF orientation says; of an animation, the first frame;
- transparency becomes white, CMYK and palettes become RGB, 16-bit and float values are scaled to 8 bits;
- shrunk, never enlarged, to at most ``max_pixels``, in the same shape;
- written as JPEG (quality 90, colour at full resolution), or as PNG when it has few colours by construction
  (1 bit, palette, GIF) and was not shrunk: lettering and line drawings stay crisp, and small.

Colour profiles are ignored, as models' own image processors do. The same bytes in give the same bytes out,
for as long as Pillow and its codecs stay the same.

Beyond :data:`MAX_DECODED_PIXELS` an image is refused by its header, before memory is reserved for its pixels.
"""

from __future__ import annotations

import io
import math
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.image_formats import (
    ImageFormat,
    image_format,
    jpeg_is_whole,
    read_png,
    read_webp,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

# Where Pillow itself begins to warn of bombs: 256 MiB of RGB. Full-frame cameras make 61 million.
MAX_DECODED_PIXELS = 89_478_485

# A progressive JPEG has about ten scans. Each is a pass over all pixels: thousands of empty ones take hours.
MAX_JPEG_SCANS = 200

# To be raised whenever the same image would come out otherwise: it is part of what identifies an answer.
PREPROCESSING_VERSION = 1

JPEG_QUALITY = 90
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

# Larger images are decoded one at a time, so that memory does not grow with the number of threads.
BIG_PIXELS = 16_000_000
_big = threading.Lock()


def fit_image(data: bytes, *, max_pixels: int | None = None) -> tuple[str, bytes]:
    """
    Check an image and make it fit for a model.

    :param data: The file's bytes.
    :param max_pixels: Most pixels of the result; None keeps the size.
    :return: MIME type and bytes; the very same bytes when they were fit already.
    :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``
    """
    from PIL.Image import DecompressionBombError

    found = image_format(data)
    try:
        return _fit(data, found, max_pixels)
    except SampleError:
        raise
    except (MemoryError, DecompressionBombError) as error:
        raise SampleError("media_too_large", f"The {found} image is too large to decode: {error}") from error
    except Exception as error:
        # Pillow answers damaged files with whatever its parsers stumble over, down to KeyError.
        reason = str(error) or type(error).__name__
        raise SampleError("media_corrupt", f"The {found} image can't be decoded: {reason[:200]}") from error


def _fit(data: bytes, found: ImageFormat, max_pixels: int | None) -> tuple[str, bytes]:
    image: ImageFile | None = None
    plain = exif = False
    if found == "PNG" or found == "WEBP":
        header = read_png(data) if found == "PNG" else read_webp(data)
        size, plain, exif = header.size, header.plain, header.exif
    else:
        image = _open(data, found)
        size = image.size
        if found == "JPEG":
            _check_jpeg(data, image)
            plain, exif = image.mode in ("L", "RGB"), "exif" in image.info
    _check_size(size)
    fit = plain and (max_pixels is None or size[0] * size[1] <= max_pixels)
    if fit and not exif:
        return MIME[found], data
    with _big if size[0] * size[1] > BIG_PIXELS else nullcontext():
        if image is None:
            image = _open(data, found)
        orientation = _orientation(image) if exif else 1
        if fit and orientation == 1:
            return MIME[found], data
        return _convert(image, orientation, max_pixels)


def _open(data: bytes, found: ImageFormat) -> ImageFile:
    """Open with the one plugin that the content calls for.

    Not by ``Image.open``: its limit of pixels and the filter of its warning are the whole process's, and it
    hands JPEGs of some phones to a plugin for multi-picture files.
    """
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    plugins: dict[ImageFormat, type[ImageFile]] = {
        "JPEG": JpegImageFile,
        "PNG": PngImageFile,
        "WEBP": WebPImageFile,
        "GIF": GifImageFile,
        "BMP": BmpImageFile,
        "TIFF": TiffImageFile,
    }
    return plugins[found](io.BytesIO(data))


def _check_jpeg(data: bytes, image: ImageFile) -> None:
    # Pillow stops reading where the first scan begins.
    if image.fp is None or not jpeg_is_whole(data, image.fp.tell()):
        raise SampleError("media_corrupt", "The JPEG is cut short: its end-of-image marker is missing.")
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise SampleError(
            "media_too_large", f"The JPEG has more than {MAX_JPEG_SCANS} scans, where photographs have ten."
        )


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise SampleError("media_corrupt", "The image has no pixels.")
    if width * height > MAX_DECODED_PIXELS:
        raise SampleError(
            "media_too_large",
            f"The image has {width} x {height} pixels; at most {MAX_DECODED_PIXELS:,} are decoded. "
            "Shrink it first.",
        )


def shrunk_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """
    Return the largest size of about the same shape with at most so many pixels, and never a side of 0.

    In whole numbers only, so that every machine comes to the same result.
    """
    width, height = size
    if width * height <= max_pixels:
        return size
    new_width = min(max(1, math.isqrt(max_pixels * width // height)), max_pixels)
    new_height = max(1, min(max_pixels // new_width, (2 * new_width * height + width) // (2 * width)))
    return new_width, new_height


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation; 1 (upright) also when only the EXIF data are damaged."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return orientation if orientation in range(2, 9) else 1


def _convert(image: ImageFile, orientation: int, max_pixels: int | None) -> tuple[str, bytes]:
    from PIL.Image import Resampling, Transpose

    if image.format != "JPEG":
        # Now and not later, because Pillow turns a TIFF upright when it loads it.
        image.load()
    source = image.size
    target = source if max_pixels is None else shrunk_size(source, max_pixels)
    few_colours = (image.mode in ("1", "P") or image.format == "GIF") and target == source
    if target != source:
        # A JPEG can be decoded at a half, a quarter or an eighth, many times faster. Twice the target leaves
        # the resampling filter enough to work on.
        image.draft(None, (target[0] * 2, target[1] * 2))
    image.load()
    result = _opaque_8_bit(image)
    if target != source:
        result = result.resize(target, Resampling.LANCZOS)
    if orientation != 1:
        method = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }[orientation]
        result = result.transpose(method)
    # What Pillow would copy into the file: profiles, comments, resolutions.
    result.info.clear()
    out = io.BytesIO()
    if few_colours:
        result.save(out, "PNG")
        return MIME["PNG"], out.getvalue()
    result.save(out, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return MIME["JPEG"], out.getvalue()


def _opaque_8_bit(image: Image) -> Image:
    """Return the image in mode ``L`` or ``RGB``."""
    from PIL.Image import new

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode == "LAB":
        raise SampleError("media_unsupported", "The image is in the colour space L*a*b*; convert it to RGB.")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled_to_8_bit(image: Image) -> Image:
    """Bring 16-bit, 32-bit and float values to 0..255. Pillow's own conversion cuts off what is above 255."""
    if image.mode.startswith("I;16"):
        image = image.convert("I")
        low, high = 0.0, 65535.0
    else:
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        if not math.isfinite(low) or not math.isfinite(high):
            raise SampleError(
                "media_unsupported", "The image has infinite values; convert it to 8 or 16 bits."
            )
        # The file does not say what is white: the usual conventions come first, then the brightest value.
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        if low >= 0:
            low, high = 0.0, next((top for top in ranges if high <= top), high)
    scale = 255 / (high - low) if high > low else 0.0
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
