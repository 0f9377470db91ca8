"""Videos that can be decoded: the right pictures, at the right times, the right way up."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import pytest
from PIL import Image, ImageChops, ImageStat

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.shards import video_container
from airflow_vlm_provider.shards.videos import sample_times
from airflow_vlm_provider.types import FrameSampling, Media
from tests.support.images import quarters
from tests.support.videos import (
    clip_of,
    images_of,
    load,
    numbered,
    numbers,
    probe,
    video,
)

TWO_A_SECOND = FrameSampling(fps=2, max_frames=100)

# Whatever people have: container, codec, pixel format.
KINDS = [
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "libx264", "yuv420p10le"),
    ("mp4", "libx264", "yuv444p"),
    ("mp4", "mpeg4", "yuv420p"),
    ("mov", "prores_ks", "yuva444p10le"),
    ("mov", "qtrle", "argb"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("mpegts", "libx264", "yuv420p"),
    ("flv", "libx264", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("asf", "wmv2", "yuv420p"),
    ("mpeg", "mpeg2video", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("apng", "apng", "rgb24"),
]
# Their encoders have no pictures that refer to later ones; AVI has no times for such pictures.
WITHOUT_B = {"libvpx", "wmv2", "gif", "apng", "qtrle", "prores_ks"}


def of_kind(container: str, codec: str, pixels: str, frames: int = 100, **more: Any) -> bytes:
    b_frames = 0 if codec in WITHOUT_B or container == "avi" else 2
    if container == "mpeg":
        # It has one time for all pictures that begin within 2 kB.
        more = {"size": (256, 256), "noisy": True, "options": {"b": "8000000"}, **more}
    return video(frames, container=container, codec=codec, pixels=pixels, fps=25, b_frames=b_frames, **more)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("as_video", [False, True], ids=["frames", "video"])
def test_the_pictures_in_the_middle_of_equal_parts(kind: tuple[str, str, str], as_video: bool) -> None:
    data = of_kind(*kind)
    # 4 seconds make 8 parts of half a second; their middles are at 0.25, 0.75, ...
    assert numbers(load(data, TWO_A_SECOND, as_video=as_video)) == [6, 18, 31, 43, 56, 68, 81, 93]
    # One part of a span in the middle, after a seek.
    window = FrameSampling(fps=1, max_frames=100, start=2.0, end=4.0)
    assert numbers(load(data, window, as_video=as_video)) == [62, 87]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_what_a_video_is_like(kind: tuple[str, str, str]) -> None:
    found = probe(of_kind(*kind))
    assert found["duration"] == pytest.approx(4.0, abs=0.041)
    assert found["width"] == found["height"] == (256 if kind[0] == "mpeg" else 64)
    assert found["fps"] == pytest.approx(25, rel=0.02)


# A PNG of one picture is an image.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "apng"], ids="-".join)
def test_a_video_of_one_picture(kind: tuple[str, str, str]) -> None:
    data = of_kind(*kind, frames=1, pictures=[numbered(1234)])
    assert numbers(load(data, TWO_A_SECOND)) == [1234]
    # Readers of clips want two.
    assert numbers(load(data, TWO_A_SECOND, as_video=True)) == [1234, 1234]
    assert 0 < probe(data)["duration"] <= 0.1


def test_how_many_pictures_are_taken() -> None:
    data = video(40, fps=10)
    for fps, most, count in [
        (1, 100, 4),
        (0.6, 100, 2),
        (0.65, 100, 3),
        (0.01, 100, 1),
        (10, 7, 7),
        (1, 1, 1),
    ]:
        assert len(numbers(load(data, FrameSampling(fps=fps, max_frames=most)))) == count
    # Never more than there are.
    assert numbers(load(data, FrameSampling(fps=1000, max_frames=1000))) == list(range(40))
    window = FrameSampling(fps=1000, max_frames=1000, start=1.0, end=2.0)
    assert numbers(load(data, window)) == list(range(10, 20))


def test_times_are_the_middles_of_equal_parts() -> None:
    assert sample_times(0, 10, 1) == [5]
    assert sample_times(10, 20, 4) == [11.25, 13.75, 16.25, 18.75]


def test_a_span_that_goes_beyond_the_end_is_cut_there() -> None:
    data = video(40, fps=10)
    assert numbers(load(data, FrameSampling(fps=1, max_frames=9, start=2, end=99))) == [25, 35]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_pictures_of_varying_length_are_found_by_time(container: str, b_frames: int) -> None:
    times = [0, 0.1, 0.2, 3.0, 3.05, 9.0, 9.5]
    data = video(times=times, last=0.5, container=container, b_frames=b_frames)
    for at, number in [(0.05, 0), (0.15, 1), (2.9, 2), (3.02, 3), (8.9, 4), (9.4, 5), (9.6, 6)]:
        around = FrameSampling(fps=1, max_frames=1, start=at - 0.005, end=at + 0.005)
        assert numbers(load(data, around)) == [number]


@pytest.mark.parametrize("start", [5.0, -0.4, 3600.0])
@pytest.mark.parametrize("container", ["matroska", "mpegts", "mp4", "flv"])
def test_times_count_from_the_first_picture(container: str, start: float) -> None:
    data = video(40, fps=10, start=start, container=container, b_frames=0)
    hidden = 4 if container == "mp4" and start < 0 else 0  # an MP4's edit list cuts off what is before 0
    assert probe(data)["duration"] == pytest.approx(4 - hidden / 10, abs=0.11)
    parts = load(data, FrameSampling(fps=1, max_frames=3, start=1, end=3))
    assert numbers(parts) == [15 + hidden, 25 + hidden]


def test_what_an_mp4_cuts_off_by_its_edit_list_is_not_there() -> None:
    data = bytearray(video(40, fps=10, b_frames=0))
    at = data.index(b"elst") + 12
    assert struct.unpack_from(">I", data, at) == (4000,)
    data[at : at + 4] = struct.pack(">I", 2000)
    assert probe(bytes(data))["duration"] == pytest.approx(2.0)
    assert numbers(load(bytes(data), FrameSampling(fps=1, max_frames=9))) == [5, 15]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
def test_sound_that_goes_on_is_no_video(container: str) -> None:
    data = video(20, fps=10, sound=9, container=container)
    assert probe(data)["duration"] == pytest.approx(2.0, abs=0.01)
    assert numbers(load(data, TWO_A_SECOND)) == [2, 7, 12, 17]


def test_sound_that_ends_before_or_begins_before_does_no_harm() -> None:
    data = video(40, fps=10, sound=1, start=0.0)
    assert numbers(load(data, FrameSampling(fps=1, max_frames=9))) == [5, 15, 25, 35]


@pytest.mark.parametrize(
    ("container", "codec", "muxer"),
    [
        ("webm", "libvpx", {"live": "1"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("flv", "libx264", {"flvflags": "no_duration_filesize"}),
        ("mpegts", "libx264", {}),
    ],
    ids=["live webm", "fragmented mp4", "flv stream", "mpegts"],
)
def test_how_long_a_stream_is_that_does_not_say(container: str, codec: str, muxer: dict[str, str]) -> None:
    data = video(200, fps=10, container=container, codec=codec, muxer=muxer, b_frames=0)
    assert probe(data)["duration"] == pytest.approx(20.0, abs=0.11)
    assert numbers(load(data, FrameSampling(fps=0.1, max_frames=9))) == [50, 150]


# ---------------------------------------------------------------- upright

TURNS = {
    (0, False): None,
    (90, False): Image.Transpose.ROTATE_90,
    (180, False): Image.Transpose.ROTATE_180,
    (270, False): Image.Transpose.ROTATE_270,
    (0, True): Image.Transpose.FLIP_LEFT_RIGHT,
    (180, True): Image.Transpose.FLIP_TOP_BOTTOM,
}


@pytest.mark.parametrize("as_video", [False, True], ids=["frames", "video"])
@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_pictures_are_upright(turn: tuple[int, bool], as_video: bool) -> None:
    stored = quarters(64).resize((64, 32))
    data = video(1, rotation=turn[0], flipped=turn[1], pictures=[stored])
    method = TURNS[turn]
    upright = stored if method is None else stored.transpose(method)
    parts = load(data, FrameSampling(fps=1, max_frames=1, end=0.05), as_video=as_video)
    shown = _first_picture(clip_of(parts)) if as_video else images_of(parts)[0]
    assert shown.size == upright.size
    assert _difference(shown, upright) < 12
    assert (probe(data)["width"], probe(data)["height"]) == upright.size


def test_pixels_that_are_not_square_are_made_so() -> None:
    data = video(2, size=(64, 64), shape=Fraction(1, 2))
    assert [image.size for image in images_of(load(data, TWO_A_SECOND))] == [(32, 64)]
    assert (probe(data)["width"], probe(data)["height"]) == (32, 64)
    assert numbers(load(data, TWO_A_SECOND, as_video=True)) == [0, 1]


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    data = video(1, container="mov", codec="qtrle", pixels="argb", b_frames=0, pictures=[clear])
    (image,) = images_of(load(data, TWO_A_SECOND))
    assert min(low for low, _ in image.getextrema()) > 250  # type: ignore[misc]


@pytest.mark.parametrize(
    ("height", "matrix", "said"),
    [
        (64, "smpte170m", True),
        (64, "bt709", True),
        (720, "smpte170m", True),
        (720, "bt709", True),
        (64, "smpte170m", False),
        (720, "bt709", False),
    ],
)
def test_colours_are_right(height: int, matrix: str, said: bool) -> None:
    data = _coloured((120, 200, 40), (64, height), matrix if said else None, matrix)
    (image,) = images_of(load(data, TWO_A_SECOND))
    assert all(abs(a - b) <= 3 for a, b in zip(image.getpixel((20, 20)), (120, 200, 40), strict=True))  # type: ignore[arg-type]
    clip = _first_picture(clip_of(load(data, TWO_A_SECOND, as_video=True, max_pixels=64 * 64 // 2)))
    assert all(abs(a - b) <= 5 for a, b in zip(clip.getpixel((5, 5)), (120, 200, 40), strict=True))  # type: ignore[arg-type]


# ---------------------------------------------------------------- sizes


def test_pictures_are_shrunk_never_enlarged() -> None:
    data = video(4, size=(160, 80))
    for as_video in (False, True):
        for most, size in [
            (10**9, (160, 80)),
            (160 * 80, (160, 80)),
            (3200, (80, 40)),
            (50, (10, 5)),
            (1, (1, 1)),
        ]:
            parts = load(data, FrameSampling(fps=5, max_frames=1), max_pixels=most, as_video=as_video)
            if as_video:
                wanted = tuple(max(2, side // 2 * 2) for side in size)
                assert _first_picture(clip_of(parts)).size == wanted
            else:
                assert images_of(parts)[0].size == size


@pytest.mark.parametrize("size", [(33, 17), (1, 1), (2, 99)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    data = video(5, size=size, container="mov", codec="qtrle", pixels="rgb24", b_frames=0)
    assert images_of(load(data, TWO_A_SECOND))[0].size == size
    clip = _first_picture(clip_of(load(data, TWO_A_SECOND, as_video=True)))
    assert clip.size == tuple(max(2, side // 2 * 2) for side in size)


def test_pictures_that_change_their_size_go_into_one_clip() -> None:
    # Two MPEG transport streams one after the other are one.
    data = video(10, container="mpegts", b_frames=0) + video(
        container="mpegts",
        b_frames=0,
        start=1.0,
        pictures=[numbered(n, (96, 96)) for n in range(10, 20)],
        times=[n / 10 for n in range(10)],
    )
    sampling = FrameSampling(fps=2, max_frames=9)
    assert {image.size for image in images_of(load(data, sampling))} == {(64, 64), (96, 96)}
    for as_video in (False, True):
        assert numbers(load(data, sampling, as_video=as_video)) == [2, 7, 12, 17]


def test_jpegs_are_as_those_of_images() -> None:
    parts = load(video(20), TWO_A_SECOND)
    said, *media = parts
    assert isinstance(said, str)
    for part in media:
        assert isinstance(part, Media)
        assert (part.kind, part.mime, part.ref) == ("image", "image/jpeg", "v")
        image = Image.open(io.BytesIO(part.data))
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_what_is_said_before_the_pictures() -> None:
    data = video(20)
    assert load(data, TWO_A_SECOND)[0] == (
        "The following 4 images are frames of one video, in order and evenly spread from second 0 to second 2."
    )
    window = FrameSampling(fps=2, max_frames=2, start=0.5, end=1.5)
    assert "2 images" in str(load(data, window)[0])
    assert str(load(data, window)[0]).endswith("from second 0.5 to second 1.5.")
    one = FrameSampling(fps=2, max_frames=1, start=1, end=2)
    assert load(data, one)[0] == "The following image is a frame of a video, at second 1.5."


# ---------------------------------------------------------------- around it


def test_without_pyav_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'airflow-provider-vlm\[video\]'"):
        video_container.import_av()


def test_importing_the_loader_imports_no_decoder() -> None:
    code = (
        "import sys, airflow_vlm_provider.shards.media; "
        "print([name for name in ('av', 'PIL', 'numpy', 'boto3', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_libav_does_not_write_to_the_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    damaged = bytearray(video(50, container="matroska"))
    for place in range(2000, len(damaged), 500):
        damaged[place] ^= 0xFF
    for as_video in (False, True):
        load(video(20), TWO_A_SECOND, as_video=as_video)
        with contextlib.suppress(SampleError):
            load(bytes(damaged), TWO_A_SECOND, as_video=as_video)
    out = capfd.readouterr()
    assert (out.out, out.err, caplog.text) == ("", "", "")


def _first_picture(clip: bytes) -> Image.Image:
    with av.open(io.BytesIO(clip)) as file:
        return next(_frames(file)).to_image()


def _frames(file: Any) -> Iterator[Any]:
    yield from file.decode(video=0)


def _difference(one: Image.Image, other: Image.Image) -> float:
    return max(ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other)).mean)


def _coloured(colour: tuple[int, int, int], size: tuple[int, int], said: str | None, matrix: str) -> bytes:
    """A video of one colour, made by one matrix and saying so or not."""
    spaces = {"smpte170m": (5, 6), "bt709": (1, 1)}
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=10, options={"preset": "ultrafast", "crf": "5"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = spaces[said][1] if said else 2
        image = Image.new("RGB", size, colour)
        frame = av.VideoFrame.from_image(image).reformat(format="yuv420p", dst_colorspace=spaces[matrix][0])
        frame.colorspace = spaces[said][1] if said else 2
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()
