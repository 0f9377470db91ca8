"""Pictures in every form that is read, and what is said of those that can't be."""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.images import fit_image
from tests.support.images import BLUE, GREEN, RED, WHITE, encode, photo, png


def refusal(data: bytes, **options: int) -> SampleError:
    """What :func:`fit_image` says of a picture that it refuses."""
    with pytest.raises(SampleError) as caught:
        fit_image(data, **options)
    assert len(caught.value.message) > 20
    return caught.value


def exif(orientation: int) -> Image.Exif:
    """Metadata that say which way up a picture is."""
    found = Image.Exif()
    found[0x0112] = orientation
    return found


# name: (its MIME type, an encoded picture that may be sent as it is)
FIT = {
    "jpeg": ("image/jpeg", encode(photo(), "JPEG")),
    "gray jpeg": ("image/jpeg", encode(photo().convert("L"), "JPEG")),
    "progressive jpeg": ("image/jpeg", encode(photo(), "JPEG", progressive=True)),
    "jpeg upright by its EXIF": ("image/jpeg", encode(photo(), "JPEG", exif=exif(1))),
    "jpeg with broken EXIF": ("image/jpeg", encode(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "png": ("image/png", encode(photo(), "PNG")),
    "gray png": ("image/png", encode(photo().convert("L"), "PNG")),
    "1-bit png": ("image/png", encode(photo().convert("1"), "PNG")),
    "palette png": ("image/png", encode(photo().quantize(16), "PNG")),
    "png upright by its EXIF": ("image/png", encode(photo(), "PNG", exif=exif(1))),
    "webp": ("image/webp", encode(photo(), "WEBP")),
    "lossless webp": ("image/webp", encode(photo(), "WEBP", lossless=True)),
    "webp upright by its EXIF": ("image/webp", encode(photo(), "WEBP", exif=exif(1))),
}


COLOURS = {
    # name: (encoded picture whose first pixel is looked at, what it must be)
    "CMYK red": (encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), (RED, (237, 28, 36))),
    "CMYK white": (encode(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), (WHITE,)),
    "CMYK TIFF blue": (encode(Image.new("CMYK", (16, 16), (255, 255, 0, 0)), "TIFF"), (BLUE,)),
    "JPEG in TIFF": (encode(Image.new("RGB", (16, 16), RED), "TIFF", compression="jpeg"), (RED,)),
    "16-bit gray PNG, middle": (encode(Image.new("I;16", (16, 16), 32768), "PNG"), (128,)),
    "16-bit gray PNG, dark": (encode(Image.new("I;16", (16, 16), 300), "PNG"), (1,)),
    "16-bit gray TIFF": (encode(Image.new("I;16", (16, 16), 32768), "TIFF"), (128,)),
    "16-bit big-endian TIFF": (encode(Image.new("I;16B", (16, 16), 32768), "TIFF"), (128,)),
    "16-bit RGB PNG": (png(1, 1, b"\0" + struct.pack(">3H", 65535, 32768, 0), depth=16), ((255, 128, 0),)),
    "16-bit gray and alpha PNG": (
        png(1, 1, b"\0" + struct.pack(">2H", 0, 32768), depth=16, colour=4),
        (128,),
    ),
    "float TIFF, 0 to 1": (encode(Image.new("F", (16, 16), 0.5), "TIFF"), (128,)),
    "float TIFF, 0 to 255": (encode(Image.new("F", (16, 16), 200.0), "TIFF"), (200,)),
    "float TIFF, 0 to 65535": (encode(Image.new("F", (16, 16), 32768.0), "TIFF"), (128,)),
    "32-bit TIFF, 0 to 255": (encode(Image.new("I", (16, 16), 200), "TIFF"), (200,)),
    "32-bit TIFF, 0 to 65535": (encode(Image.new("I", (16, 16), 32768), "TIFF"), (128,)),
    "transparent is white": (encode(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG"), (WHITE,)),
    "half transparent": (encode(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG"), (127,)),
    "opaque RGBA": (encode(Image.new("RGBA", (16, 16), (*GREEN, 255)), "PNG"), (GREEN,)),
    "gray and alpha": (encode(Image.new("LA", (16, 16), (0, 64)), "PNG"), (191,)),
    "RGB with a transparent colour": (
        encode(Image.new("RGB", (16, 16), RED), "PNG", transparency=RED),
        (WHITE,),
    ),
    "gray with a transparent value": (encode(Image.new("L", (16, 16), 7), "PNG", transparency=7), (WHITE,)),
    "palette with a transparent entry": (
        encode(Image.new("RGB", (16, 16), BLUE).quantize(2), "PNG", transparency=0),
        (WHITE,),
    ),
    "transparent WebP": (
        encode(Image.new("RGBA", (16, 16), (0, 0, 255, 0)), "WEBP", lossless=True),
        (WHITE,),
    ),
    "GIF": (encode(Image.new("RGB", (16, 16), GREEN), "GIF"), (GREEN,)),
    "transparent GIF": (encode(Image.new("P", (16, 16), 0), "GIF", transparency=0), (WHITE,)),
    "BMP": (encode(Image.new("RGB", (16, 16), BLUE), "BMP"), (BLUE,)),
    "1-bit BMP": (encode(Image.new("1", (16, 16), 1), "BMP"), (255,)),
    "TIFF": (encode(Image.new("RGB", (16, 16), GREEN), "TIFF", compression="tiff_lzw"), (GREEN,)),
    "1-bit TIFF": (encode(Image.new("1", (16, 16), 1), "TIFF", compression="group4"), (255,)),
    "palette TIFF": (encode(Image.new("RGB", (16, 16), RED).quantize(4), "TIFF"), (RED,)),
}
