from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image, ImageFile

from airflow_vlm_provider.shards.images import fit_image, shrunk_size
from tests.support.fit_images import COLOURS, FIT, exif, refusal
from tests.support.images import BLUE, GREEN, RED, WHITE, decode, encode, photo, png_chunk, quarters


def near(pixel: object, expected: object, tolerance: int = 12) -> bool:
    seen = pixel if isinstance(pixel, tuple) else (pixel,) * 3
    wanted = expected if isinstance(expected, tuple) else (expected,) * 3
    return len(seen) == len(wanted) and all(
        abs(a - b) <= tolerance for a, b in zip(seen, wanted, strict=True)
    )


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
