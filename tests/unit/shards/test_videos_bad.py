"""Videos that are damaged, incomplete, hostile or none at all: each a sample's error that says what is wrong."""

from __future__ import annotations

import io
import random
import socket
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards import video_container, video_frames
from airflow_vlm_provider.shards.images import MAX_DECODED_PIXELS
from airflow_vlm_provider.shards.video_files import PositionReader
from airflow_vlm_provider.types import FrameSampling, Part
from tests.support.images import encode, photo
from tests.support.videos import clip_of, load, numbered, numbers, probe, video

ONE_A_SECOND = FrameSampling(fps=1, max_frames=100)


def failure(data: bytes | Path, sampling: FrameSampling = ONE_A_SECOND) -> SampleError:
    """Prepare a video in both ways; both fail in the same."""
    errors = []
    for as_video in (False, True):
        with pytest.raises(SampleError) as caught:
            load(data, sampling, as_video=as_video)
        errors.append(caught.value)
    one, other = errors
    assert one.kind == other.kind
    assert one.media is not None
    assert len(one.message) > 20
    return one


def probe_failure(data: bytes) -> SampleError:
    with pytest.raises(SampleError) as caught:
        probe(data)
    return caught.value


# ---------------------------------------------------------------- no video


def test_an_empty_file() -> None:
    assert failure(b"").kind == probe_failure(b"").kind == "media_corrupt"
    assert "empty" in failure(b"").message


@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_random_bytes(size: int) -> None:
    data = random.Random(size).randbytes(size)
    # By chance, they look like the beginning of something.
    assert failure(data).kind == probe_failure(data).kind
    assert failure(data).kind in ("media_corrupt", "media_unsupported")
    assert "no video" in failure(data).message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_picture_under_a_videos_name(form: str) -> None:
    error = failure(encode(photo(), form))
    assert error.kind == "media_unsupported"
    assert form in error.message


def test_a_still_gif_is_a_video_of_one_picture() -> None:
    still = numbered(77).convert("P")
    assert numbers(load(encode(still, "GIF"), ONE_A_SECOND)) == [77]


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>Not Found</body></html>" * 20,
        b"%PDF-1.7\n" * 100,
        b"PK\x03\x04" + bytes(5000),
        b"text " * 1000,
    ],
    ids=["html", "pdf", "zip", "text"],
)
def test_other_files(data: bytes) -> None:
    assert failure(data).kind in ("media_corrupt", "media_unsupported")


@pytest.mark.parametrize("container", ["h264", "nut", "yuv4mpegpipe", "ivf"])
def test_what_libav_could_read_but_is_no_container_of_ours(container: str) -> None:
    codec = {"yuv4mpegpipe": "rawvideo", "ivf": "libvpx"}.get(container, "libx264")
    data = video(20, container=container, codec=codec, b_frames=0)
    with av.open(io.BytesIO(data)) as file:
        assert len(file.streams.video) == 1
    error = failure(data)
    assert error.kind == "media_unsupported"
    assert "MP4" in error.message


def _sound(container: str, codec: str, *, cover: bool = False) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=48000)
        picture: Any = None
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 64
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
        for number in range(100):
            frame = av.AudioFrame(format=stream.codec_context.format.name, layout="stereo", samples=960)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts, frame.time_base = 48000, number * 960, Fraction(1, 48000)
            file.mux(stream.encode(frame))
        if cover:
            file.mux(picture.encode(av.VideoFrame.from_image(photo()).reformat(format="yuvj420p")))
            file.mux(picture.encode(None))
        file.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        _sound("mp4", "aac"),
        _sound("matroska", "libopus"),
        _sound("ogg", "libopus"),
        _sound("mp4", "aac", cover=True),
    ],
    ids=["mp4", "mkv", "ogg", "with a cover picture"],
)
def test_sound_alone(data: bytes) -> None:
    error = failure(data)
    assert error.kind == probe_failure(data).kind == "media_unsupported"
    assert "sound" in error.message


def test_a_codec_that_nobody_knows() -> None:
    data = video(20).replace(b"avc1", b"zzz9")
    error = failure(data)
    assert error.kind == probe_failure(data).kind == "media_unsupported"
    assert "codec" in error.message


# ---------------------------------------------------------------- cut short, damaged


def _cut(container: str, share: float, **more: Any) -> bytes:
    """The beginning of a video of 20 seconds."""
    data = video(200, container=container, size=(128, 128), noisy=True, **more)
    return data[: int(len(data) * share)]


def test_an_mp4_without_its_index() -> None:
    error = failure(_cut("mp4", 0.6))
    assert error.kind == "media_corrupt"
    assert "index is missing" in error.message


@pytest.mark.parametrize(
    ("container", "muxer"),
    [("mp4", {"movflags": "faststart"}), ("matroska", {}), ("flv", {}), ("avi", {})],
    ids=["mp4", "mkv", "flv", "avi"],
)
def test_what_is_beyond_a_cut_is_not_made_up(container: str, muxer: dict[str, str], tmp_path: Path) -> None:
    codec = "mpeg4" if container == "avi" else "libx264"
    size = (128, 128)
    path = tmp_path / "whole"
    data = video(
        200, container=container, codec=codec, b_frames=0, size=size, noisy=True, muxer=muxer, path=path
    )
    cut = data[: int(len(data) * 0.6)]
    assert len(numbers(load(data, ONE_A_SECOND))) == 20
    assert "cut short" in failure(cut).message
    assert failure(cut).kind == "media_corrupt"
    # What is there can be had.
    before = FrameSampling(fps=1, max_frames=99, start=2, end=8)
    assert numbers(load(cut, before)) == [25, 35, 45, 55, 65, 75]
    after = FrameSampling(fps=1, max_frames=99, start=15, end=18)
    if container != "avi":  # whose duration is told by what is there once its index is gone
        assert probe(cut)["duration"] == pytest.approx(20, abs=0.2)
        assert "cut short" in failure(cut, after).message
    assert failure(cut, after).kind == "media_corrupt"


def test_a_file_that_would_be_sent_as_it_is_but_for_its_missing_end(tmp_path: Path) -> None:
    data = video(
        20, fps=2, size=(128, 128), noisy=True, muxer={"movflags": "faststart"}, path=tmp_path / "v.mp4"
    )
    sampling = FrameSampling(fps=2, max_frames=20)
    assert clip_of(load(data, sampling, as_video=True)) == data
    assert failure(data[: int(len(data) * 0.8)], sampling).kind == "media_corrupt"


def test_a_stream_that_says_no_duration_is_whole_as_far_as_anybody_knows() -> None:
    cut = _cut("mpegts", 0.5)
    assert 9 < probe(cut)["duration"] < 11
    assert numbers(load(cut, ONE_A_SECOND))[:9] == [5, 15, 25, 35, 45, 55, 65, 75, 85]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_damaged_part_is_not_made_up_either(container: str) -> None:
    data = bytearray(video(300, container=container, size=(128, 128), noisy=True, gop=50, b_frames=0))
    start, end = int(len(data) * 0.4), int(len(data) * 0.6)
    data[start:end] = bytes(end - start)
    if container == "mp4":  # in Matroska, what is lost can't be told from what never was
        error = failure(bytes(data))
        assert error.kind == "media_corrupt"
        assert "damaged" in error.message
    before = FrameSampling(fps=1, max_frames=99, end=8)
    assert numbers(load(bytes(data), before)) == [5, 15, 25, 35, 45, 55, 65, 75]
    after = FrameSampling(fps=1, max_frames=99, start=25, end=29)
    assert numbers(load(bytes(data), after)) == [255, 265, 275, 285]


def test_a_beginning_that_can_not_be_decoded() -> None:
    # A recording that begins between two keyframes.
    data = video(200, container="mpegts", gop=15, b_frames=0, size=(128, 128), noisy=True)
    late = data[int(len(data) * 0.11) // 188 * 188 :]
    assert numbers(load(late, FrameSampling(fps=1, max_frames=1, end=0.1))) == [30]


def test_every_prefix_and_many_flipped_bits_end_well() -> None:
    """Whatever the damage: pictures, or a sample's error. Never another exception, a crash or a hang."""
    ended: list[str] = []
    for container in ("mp4", "matroska", "mpegts", "gif"):
        whole = video(
            30,
            container=container,
            codec="gif" if container == "gif" else "libx264",
            pixels="rgb8" if container == "gif" else "yuv420p",
            muxer={"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {},
        )
        chance = random.Random(container)
        broken = [whole[: len(whole) * share // 12] for share in range(12)]
        for _ in range(25):
            flipped = bytearray(whole)
            for _ in range(chance.randint(1, 30)):
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            broken.append(bytes(flipped))
        for data in broken:
            for attempt in (probe, _as_frames, _as_clip):
                ended.append(_ended(attempt, data))
    assert set(ended) <= {"", "media_corrupt", "media_unsupported", "media_too_large"}
    assert {"", "media_corrupt"} <= set(ended)


def _ended(attempt: Callable[[bytes], object], data: bytes) -> str:
    """The kind of error that an attempt ends in, or nothing."""
    try:
        assert attempt(data)
    except SampleError as error:
        return error.kind
    return ""


def _as_frames(data: bytes) -> Sequence[Part]:
    return load(data, ONE_A_SECOND)


def _as_clip(data: bytes) -> Sequence[Part]:
    return load(data, ONE_A_SECOND, as_video=True)


def test_a_span_beyond_the_end() -> None:
    error = failure(video(20), FrameSampling(fps=1, max_frames=9, start=2.5, end=5))
    assert error.kind == "media_corrupt"
    assert "lasts 2.0 seconds" in error.message


# ---------------------------------------------------------------- too much


def _with_size(data: bytes, width: int, height: int) -> bytes:
    """Make a QuickTime file claim another size."""
    at = data.index(b"raw ", data.index(b"stsd")) + 4 + 24
    assert struct.unpack_from(">HH", data, at) == (64, 64)
    return data[:at] + struct.pack(">HH", width, height) + data[at + 4 :]


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    small = video(2, container="mov", codec="rawvideo", pixels="rgb24", b_frames=0)
    assert numbers(load(_with_size(small, 64, 64), ONE_A_SECOND)) == [1]
    for width, height in [(16_000, 16_000), (65_535, 2), (MAX_DECODED_PIXELS // 10_000 + 1, 10_000)]:
        error = failure(_with_size(small, width, height))
        assert error.kind == probe_failure(_with_size(small, width, height)).kind == "media_too_large"
        assert f"{width} x {height}" in error.message
    absurd = failure(_with_size(small, 60_000, 60_000))
    assert absurd.kind == "media_corrupt"
    assert "how large" in absurd.message


def test_a_picture_that_is_larger_than_the_header_says_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit is the decoder's, too: pictures may grow in the middle of a video."""
    monkeypatch.setattr(video_container, "LIMITS", {"max_pixels": str(64 * 64)})
    grown = video(10, container="mpegts", b_frames=0) + video(
        times=[n / 10 for n in range(20)],
        container="mpegts",
        b_frames=0,
        start=1.0,
        pictures=[numbered(n, (128, 128)) for n in range(10, 30)],
    )
    assert numbers(load(grown, FrameSampling(fps=2, max_frames=9, end=1.0))) == [2, 7]
    assert failure(grown, FrameSampling(fps=2, max_frames=9)).kind == "media_corrupt"
    monkeypatch.undo()
    assert numbers(load(grown, FrameSampling(fps=2, max_frames=9)))[:4] == [2, 7, 12, 17]


def test_days_of_pictures_in_a_small_file_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "MAX_PASSED_PIXELS", 50 * video_frames._PACKET_PIXELS)
    data = video(300, gop=1000, b_frames=0)
    error = failure(data, FrameSampling(fps=0.1, max_frames=1))
    assert error.kind == "media_too_large"
    assert "keyframe" in error.message
    # Where keyframes are, they are used, and the limit is for what is decoded.
    assert numbers(load(video(300, gop=10), FrameSampling(fps=0.1, max_frames=1))) == [150]


# ---------------------------------------------------------------- guarantee 9: a dataset can't reach out


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A video that others point at, in the current directory, where relative names lead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mp4").write_bytes(video(20))
    (tmp_path / "secret.ts").write_bytes(video(20, container="mpegts"))
    return tmp_path


def scripts(folder: Path, url: str) -> dict[str, bytes]:
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
    manifest = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000">'
        "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    return {
        "hls": playlist.format("secret.ts").encode(),
        "hls by path": playlist.format(f"file://{folder}/secret.ts").encode(),
        "hls by http": playlist.format(f"{url}/a.ts").encode(),
        "concat": b"ffconcat version 1.0\nfile secret.mp4\nduration 2\n",
        "concat by path": f"ffconcat version 1.0\nfile {folder}/secret.mp4\n".encode(),
        "concat by http": f"ffconcat version 1.0\nfile {url}/a.mp4\n".encode(),
        "dash": manifest.format("secret.mp4").encode(),
        "dash by http": manifest.format(f"{url}/a.mp4").encode(),
        "sdp": session.encode(),
        "rtsp redirect": f"[Reference]\nRef1={url}/a.mp4\n".encode(),
        "protocol": b"concat:secret.mp4|secret.mp4",
        "path": f"file://{folder}/secret.mp4".encode(),
    }


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat", "mpd", "sdp", "txt"])
def test_a_script_under_a_videos_name_leads_nowhere(beside: Path, suffix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name, script in scripts(beside, url).items():
            path = beside / f"script.{suffix}"
            path.write_bytes(script)
            for data in (path, script):
                error = failure(data)
                assert error.kind in ("media_corrupt", "media_unsupported"), name
        with pytest.raises(TimeoutError):
            listener.accept()


def test_without_the_list_of_containers_a_script_would_still_lead_nowhere(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the file itself is ever opened, by whatever demuxer."""
    monkeypatch.setattr(video_container, "CONTAINERS", "concat,hls,mov,mpegts")
    concat, playlist = (scripts(beside, "")[name] for name in ("concat", "hls"))
    with av.open(io.BytesIO(concat)) as followed:
        assert followed.format.name == "concat"  # so this is what has to be prevented
    assert failure(concat).kind == "media_unsupported"
    monkeypatch.setattr(PositionReader, "name", "list.m3u8")
    error = failure(playlist)
    assert error.kind == "media_refused"
    assert "secret.ts" in error.message


def test_the_pictures_of_a_numbered_series_are_not_looked_for(beside: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(beside / f"{number:03}.png")
    (beside / "%03d.png").write_bytes(encode(photo(), "PNG"))
    assert failure(beside / "%03d.png").kind == "media_unsupported"
