"""Pictures that are damaged, too large or no pictures at all: none does more harm than to its own sample."""

from __future__ import annotations

import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards import images
from airflow_vlm_provider.shards.images import MAX_DECODED_PIXELS, MIME, fit_image
from tests.support.fit_images import COLOURS, FIT, exif, refusal
from tests.support.images import encode, photo, png, png_chunk, quarters, with_jpeg_size

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
