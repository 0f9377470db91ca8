from __future__ import annotations

import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image, ImageFile

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards import images
from airflow_vlm_provider.shards.images import MAX_DECODED_PIXELS, MIME, fit_image, shrunk_size
from tests.support.images import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    decode,
    encode,
    photo,
    png,
    png_chunk,
    quarters,
    with_jpeg_size,
)


def near(pixel: object, expected: object, tolerance: int = 12) -> bool:
    seen = pixel if isinstance(pixel, tuple) else (pixel,) * 3
    wanted = expected if isinstance(expected, tuple) else (expected,) * 3
    return len(seen) == len(wanted) and all(
        abs(a - b) <= tolerance for a, b in zip(seen, wanted, strict=True)
    )


def refusal(data: bytes, **options: int) -> SampleError:
    with pytest.raises(SampleError) as caught:
        fit_image(data, **options)
    assert len(caught.value.message) > 20
    return caught.value


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


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


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("max_pixels", [None, 64 * 64])
def test_a_fit_image_is_sent_untouched(name: str, max_pixels: int | None) -> None:
    mime, data = FIT[name]
    seen_mime, seen = fit_image(data, max_pixels=max_pixels)
    assert seen_mime == mime
    assert seen is data


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_a_fit_image_is_not_even_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert fit_image(FIT[name][1])[1] is FIT[name][1]


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    data = encode(photo(), "JPEG")
    for tail in (b"\0" * 1000, b"\n", b"\0\0\0\x18ftypmp42" + bytes(range(256))):
        assert fit_image(data + tail) == ("image/jpeg", data + tail)


def test_a_jpeg_of_several_pictures_counts_as_its_first() -> None:
    data = encode(quarters(), "MPO", save_all=True, append_images=[photo()])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert fit_image(data) == ("image/jpeg", data)


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


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("max_pixels", [None, 50])
def test_colours_survive_the_conversion(name: str, max_pixels: int | None) -> None:
    data, expected = COLOURS[name]
    mime, fit = fit_image(data, max_pixels=max_pixels)
    image = decode(fit)
    assert Image.MIME[image.format or ""] == mime
    assert image.mode in ("L", "RGB")
    pixel = image.getpixel((0, 0))
    assert any(near(pixel, colour) for colour in expected), pixel
    # And what was made fit once is fit.
    assert fit_image(fit, max_pixels=max_pixels) == (mime, fit)


def test_values_beyond_16_bits_are_spread_over_the_range_that_they_use() -> None:
    image = Image.new("I", (16, 16), 1_000_000)
    image.paste(-1_000_000, (0, 0, 8, 16))
    fit = decode(fit_image(encode(image, "TIFF"))[1])
    assert near(fit.getpixel((1, 8)), 0)
    assert near(fit.getpixel((14, 8)), 255)


def test_infinite_values_have_no_brightness() -> None:
    image = Image.new("F", (16, 16), 1.0)
    image.putpixel((0, 0), float("inf"))
    assert refusal(encode(image, "TIFF")).kind == "media_unsupported"


def test_lab_is_named_as_what_it_is() -> None:
    error = refusal(encode(Image.new("LAB", (16, 16)), "TIFF"))
    assert error.kind == "media_unsupported"
    assert "L*a*b*" in error.message


# Where the red, green, blue and white quarters of the stored picture belong.
ORIENTATIONS = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("max_pixels", [None, 256])
def test_orientation_is_applied(format: str, orientation: int, max_pixels: int | None) -> None:
    data = encode(quarters(), format, exif=exif(orientation))
    image = decode(fit_image(data, max_pixels=max_pixels)[1])
    assert image.getexif().get(0x0112, 1) == 1
    low, high = image.width // 4, image.width * 3 // 4
    seen = [image.convert("RGB").getpixel(at) for at in ((low, low), (high, low), (low, high), (high, high))]
    assert all(near(a, b, 40) for a, b in zip(seen, ORIENTATIONS[orientation], strict=True)), seen


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("max_pixels", [None, 800])
def test_orientation_swaps_the_sides(format: str, max_pixels: int | None) -> None:
    data = encode(photo(80, 40), format, exif=exif(6))
    assert decode(fit_image(data, max_pixels=max_pixels)[1]).size == (
        (40, 80) if max_pixels is None else (20, 40)
    )


def test_a_png_may_have_its_orientation_behind_its_pixels() -> None:
    data = encode(quarters(), "PNG")
    body = exif(6).tobytes().removeprefix(b"Exif\0\0")
    data = data[:-12] + png_chunk(b"eXIf", body) + data[-12:]
    image = decode(fit_image(data)[1])
    assert near(image.getpixel((8, 8)), BLUE, 40)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_sent(format: str) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    data = encode(first, format, save_all=True, append_images=[second], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    image = decode(fit_image(data)[1])
    assert getattr(image, "n_frames", 1) == 1
    assert near(image.convert("RGB").getpixel((8, 8)), RED)


def test_the_other_frames_of_a_gif_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    still = encode(Image.new("RGB", (16, 16), GREEN), "GIF")
    start = still.index(b"\x2c", 13 + 6)
    bomb = still[:-1] + still[start:-1] * 20_000 + b";"
    frames: list[int] = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile,
        "_seek",
        lambda self, frame, *rest, **more: (frames.append(frame), seek(self, frame, *rest, **more))[1],
    )
    assert near(decode(fit_image(bomb)[1]).convert("RGB").getpixel((8, 8)), GREEN)
    assert set(frames) == {0}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_is_shrunk_to_the_limit_in_the_same_shape(format: str) -> None:
    image = decode(fit_image(encode(photo(400, 200), format), max_pixels=20_000)[1])
    assert image.size == (200, 100)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_an_image_is_never_enlarged(format: str) -> None:
    assert decode(fit_image(encode(photo(20, 10), format), max_pixels=1_000_000)[1]).size == (20, 10)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, *args: object, **options: object) -> Image.Image:
        sizes.append(self.size)
        return resize(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    data = encode(photo(1600, 1600), "JPEG")
    sizes.clear()
    assert decode(fit_image(data, max_pixels=100 * 100)[1]).size == (100, 100)
    assert sizes == [(200, 200)]


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (5000, 2), (3, 4000)])
def test_a_thin_image_keeps_at_least_one_pixel_a_side(size: tuple[int, int]) -> None:
    fit = decode(fit_image(encode(Image.new("RGB", size, RED), "PNG"), max_pixels=100)[1])
    assert min(fit.size) >= 1
    assert fit.width * fit.height <= 100


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 10_000_000))
def test_shrunk_size_keeps_its_promises(width: int, height: int, max_pixels: int) -> None:
    new_width, new_height = shrunk_size((width, height), max_pixels)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert new_width * new_height <= max_pixels
    if min(new_width, new_height) > 1:
        # The shape is right to within a pixel on either side.
        assert abs(new_height - new_width * height / width) <= 1 + height / width
    if width * height <= max_pixels:
        assert (new_width, new_height) == (width, height)


def test_few_colours_become_png_and_photographs_jpeg() -> None:
    drawing = encode(quarters(), "GIF")
    assert fit_image(drawing)[0] == "image/png"
    assert decode(fit_image(drawing)[1]).convert("RGB").getpixel((1, 1)) == RED
    assert fit_image(encode(photo(), "BMP"))[0] == "image/jpeg"
    assert fit_image(drawing, max_pixels=100)[0] == "image/jpeg"


def test_the_same_bytes_in_give_the_same_bytes_out() -> None:
    sources = [encode(photo(300, 200), format) for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")]
    expected = [fit_image(data, max_pixels=9000) for data in sources]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(lambda data: fit_image(data, max_pixels=9000), sources)) == expected


def test_nothing_of_the_sources_metadata_is_sent_on() -> None:
    found = exif(6)
    found[0x010E] = "where I live"
    data = encode(photo(), "JPEG", exif=found, comment=b"where I live", icc_profile=b"where I live")
    assert b"where I live" in data
    assert b"where I live" not in fit_image(data)[1]


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_image_is_corrupt(name: str, share: float) -> None:
    data = FIT[name][1]
    assert refusal(data[: int(len(data) * share)]).kind == "media_corrupt"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_a_truncated_image_of_a_format_that_is_always_decoded_is_corrupt(format: str) -> None:
    data = encode(photo(), format)
    for share in (0.05, 0.5, 0.9):
        assert refusal(data[: int(len(data) * share)]).kind == "media_corrupt"


def test_a_jpeg_without_its_last_two_bytes_is_corrupt() -> None:
    data = encode(photo(), "JPEG")
    assert "cut short" in refusal(data[:-2]).message
    assert "cut short" in refusal(data[:-2] + b"\0" * 500).message


def test_the_end_of_an_embedded_thumbnail_is_not_the_jpegs() -> None:
    thumbnail = b"Exif\0\0" + encode(photo(16, 16), "JPEG")
    data = encode(photo(), "JPEG", exif=thumbnail)
    assert fit_image(data)[1] is data
    assert refusal(data[: len(data) - 40]).kind == "media_corrupt"


def test_a_png_cut_within_a_chunk_is_named_as_that() -> None:
    assert "cut short" in refusal(encode(photo(), "PNG")[:-20]).message


def test_a_png_with_a_flipped_bit_is_corrupt() -> None:
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2] ^= 1
    assert "checksum" in refusal(bytes(data)).message


def test_a_png_with_two_headers_is_corrupt() -> None:
    small = png(1, 1, b"\0\0\0\0")
    second = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    assert refusal(small[:33] + second + small[33:]).kind == "media_corrupt"


OTHERS = {
    "nothing": (b"", "media_corrupt", "empty"),
    "text": (b"This picture was removed.", "media_corrupt", "text"),
    "HTML": (b"\n <!DOCTYPE html><html>404</html>", "media_corrupt", "HTML"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "media_unsupported", "SVG"),
    "noise": (bytes(range(128, 256)), "media_corrupt", "80 81"),
    "PDF": (b"%PDF-1.7\n", "media_unsupported", "PDF"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "media_unsupported", "PostScript"),
    "video": (b"\0\0\0\x20ftypisom\0\0\2\0", "media_unsupported", "MP4"),
    "AVIF": (b"\0\0\0\x20ftypavif\0\0\0\0", "media_unsupported", "AVIF"),
    "HEIC": (b"\0\0\0\x20ftypheic\0\0\0\0", "media_unsupported", "HEIC"),
    "PPM": (b"P6 1 1 255\n\0\0\0", "media_corrupt", "unknown"),
    "only a JPEG's first bytes": (b"\xff\xd8\xff", "media_corrupt", "JPEG"),
    "only a PNG's first bytes": (b"\x89PNG\r\n\x1a\n", "media_corrupt", "PNG"),
    "only a GIF's first bytes": (b"GIF89a", "media_corrupt", "GIF"),
    "only a BMP's first bytes": (b"BM", "media_corrupt", "BMP"),
    "only a TIFF's first bytes": (b"II*\0", "media_corrupt", "TIFF"),
    "only a WebP's first bytes": (b"RIFF\0\0\0\0WEBP", "media_corrupt", "WebP"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_image_is_named(name: str) -> None:
    data, kind, word = OTHERS[name]
    error = refusal(data)
    assert error.kind == kind
    assert word in error.message


# ---------------------------------------------------------------- bombs


def gif_of_size(width: int, height: int) -> bytes:
    data = encode(Image.new("P", (4, 4)), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def gif_frame_of_size(width: int, height: int) -> bytes:
    data = encode(Image.new("P", (4, 4)), "GIF")
    start = data.index(b"\x2c", 13 + 6)
    return data[: start + 5] + struct.pack("<HH", width, height) + data[start + 9 :]


def bmp_of_size(width: int, height: int) -> bytes:
    data = encode(Image.new("RGB", (4, 4)), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def tiff_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("L", (4, 4)), "TIFF"))
    directory = struct.unpack_from("<I", data, 4)[0]
    for i in range(struct.unpack_from("<H", data, directory)[0]):
        at = directory + 2 + 12 * i
        value = {256: width, 257: height}.get(struct.unpack_from("<H", data, at)[0])
        if value is not None:
            struct.pack_into("<HII", data, at + 2, 4, 1, value)
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    data = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", exif=exif(1), lossless=True)
    assert data[12:16] == b"VP8X"
    return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]


BOMBS = {
    "PNG": png(50_000, 50_000, b"\0" * 1000),
    "PNG with alpha": png(50_000, 50_000, b"\0" * 1000, colour=6),
    "JPEG": with_jpeg_size(encode(photo(), "JPEG"), 65_000, 65_000),
    "progressive JPEG": with_jpeg_size(encode(photo(), "JPEG", progressive=True), 65_000, 65_000),
    "GIF": gif_of_size(65_000, 65_000),
    "GIF by its frame": gif_frame_of_size(65_000, 65_000),
    "BMP": bmp_of_size(50_000, 50_000),
    "TIFF": tiff_of_size(3_000_000_000, 3_000_000_000),
    "WebP": webp_of_size(1 << 24, 1 << 24),
    "JPEG of which Pillow would only warn": with_jpeg_size(encode(photo(), "JPEG"), 12_000, 12_000),
    "just too large": png(1, MAX_DECODED_PIXELS + 1, b"\0" * 1000),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("max_pixels", [None, 1000])
def test_a_bomb_is_refused_before_it_is_decoded(
    name: str, max_pixels: int | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    error = refusal(BOMBS[name], max_pixels=max_pixels)
    assert error.kind == "media_too_large"
    assert not recwarn.list


def test_a_png_at_the_limit_is_no_bomb() -> None:
    data = png(1, MAX_DECODED_PIXELS, b"\0" * 1000)
    assert fit_image(data)[1] is data


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_compressed_text_in_a_png_is_not_a_way_to_fill_the_memory(kind: bytes) -> None:
    packed = zlib.compress(b"\0" * 100_000_000, 9)
    keyword = b"Comment\0\0" if kind == b"zTXt" else b"Comment\0\1\0\0\0"
    extra = png_chunk(kind, keyword + packed)
    error = refusal(png(1, 1, b"\0\0\0\0\0", colour=6, extra=extra))
    assert error.kind == "media_corrupt"
    assert "too large" in error.message


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    error = refusal(data[:-2] + data[last:-2] * 1000 + b"\xff\xd9", max_pixels=100)
    assert error.kind == "media_too_large"
    assert "scans" in error.message


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BIG_PIXELS", 1000)
    running, most, guard = 0, 0, threading.Lock()
    both = threading.Barrier(2)
    load = Image.Image.resize

    def watched(self: Image.Image, *args: object, **options: object) -> Image.Image:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        # Were there two at once, they would meet here.
        try:
            both.wait(timeout=0.2)
        except threading.BrokenBarrierError:
            both.reset()
        try:
            return load(self, *args, **options)  # type: ignore[arg-type]
        finally:
            with guard:
                running -= 1

    sources = [encode(photo(), "PNG")] * 3
    monkeypatch.setattr(Image.Image, "resize", watched)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda data: fit_image(data, max_pixels=100), sources))
    assert most == 1


# ---------------------------------------------------------------- fuzzing

SEEDS = [
    *(data for _, data in FIT.values()),
    *(data for data, _ in COLOURS.values()),
    *(encode(photo(), format, exif=exif(6)) for format in ("JPEG", "PNG", "WEBP", "TIFF")),
    encode(photo(), "GIF", save_all=True, append_images=[quarters(64)]),
    encode(photo(), "TIFF", compression="tiff_deflate"),
    encode(photo(), "TIFF", compression="jpeg"),
]


def assert_fits_or_says_why(data: bytes, max_pixels: int | None) -> None:
    try:
        result, _ = fit_image(data, max_pixels=max_pixels)
    except SampleError as error:
        result = error.kind
    assert result in (*MIME.values(), "media_corrupt", "media_unsupported", "media_too_large")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.01, 1) | st.just(1.0),
    st.sampled_from([None, 500]),
)
def test_a_damaged_image_raises_nothing_but_a_sample_error(
    seed: bytes, changes: list[tuple[float, int]], share: float, max_pixels: int | None
) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * len(data))] = value
    assert_fits_or_says_why(bytes(data[: int(len(data) * share)]), max_pixels)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0"]
    ),
    st.binary(max_size=400),
    st.sampled_from([None, 1]),
)
def test_random_bytes_raise_nothing_but_a_sample_error(
    magic: bytes, rest: bytes, max_pixels: int | None
) -> None:
    assert_fits_or_says_why(magic + rest, max_pixels)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.sampled_from([b"VP8 ", b"VP8L", b"VP8X", b"ALPH"]))
def test_random_webps_raise_nothing_but_a_sample_error(rest: bytes, kind: bytes) -> None:
    assert_fits_or_says_why(b"RIFF" + struct.pack("<I", len(rest) + 8) + b"WEBP" + kind + rest, 10)
