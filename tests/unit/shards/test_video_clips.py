"""Clips that are made of videos: they play as long, servers can read them, and a fit video is sent as it is."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from airflow_vlm_provider.shards import video_clip
from airflow_vlm_provider.shards.videos import MAX_UNTOUCHED_BYTES, sample_times
from airflow_vlm_provider.types import FrameSampling
from tests.support.videos import (
    clip_numbers,
    clip_of,
    load,
    number_of,
    video,
)


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 200])
def test_a_clip_plays_as_long_as_what_it_is_of(
    count: int, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder == "mpeg4":
        monkeypatch.setattr(video_clip, "_BEST_ENCODER", "not there")
    data = video(300, fps=30)
    parts = load(data, FrameSampling(fps=100, max_frames=count, start=2, end=9), as_video=True)
    shown = clip_numbers(clip_of(parts))
    count = max(2, count // 2 * 2)
    times = sample_times(2, 9, count)
    assert [number for _, number in shown] == [int(time * 30 + 1e-6) for time in times]
    # Each is shown for its own part of the time, so that what the clip shows at a sampled time is what the video shows.
    assert [time for time, _ in shown] == pytest.approx(
        [7 * k / count for k in range(count)], abs=0.001 * count
    )
    with av.open(io.BytesIO(clip_of(parts))) as file:
        stream = file.streams.video[0]
        assert file.duration is not None
        assert file.duration / 1e6 == pytest.approx(7.0, abs=0.01)
        assert stream.frames == count
        assert stream.codec_context.name == ("h264" if encoder == "libx264" else "mpeg4")
        assert stream.codec_context.pix_fmt == "yuv420p"
        # SMPTE 170M in the range of television, and it says so: players would take HD for BT.709.
        said = (6, 1) if encoder == "libx264" else (2, 0)  # MPEG-4 has no words for it
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == said


@pytest.mark.parametrize("count", [1, 2, 5, 32])
@pytest.mark.parametrize("seconds", [1, 30, 36_000])
def test_opencv_reads_clips(count: int, seconds: int, tmp_path: Path) -> None:
    """Servers read what they get by OpenCV: the number of pictures, the rate, and then one after the other."""
    import cv2

    times = [k * seconds / 97 for k in range(97)]
    data = video(times=times, last=seconds / 97, b_frames=0)
    sampling = FrameSampling(fps=1000, max_frames=count)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip_of(load(data, sampling, as_video=True)))
    reader = cv2.VideoCapture(str(path))
    count = max(2, count // 2 * 2)
    assert int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) == count
    assert reader.get(cv2.CAP_PROP_FPS) == pytest.approx(count / seconds, rel=0.02)
    found = []
    while True:
        more, pixels = reader.read()
        if not more:
            break
        found.append(number_of(Image.fromarray(pixels)))
    assert found == [int(97 * (k + 0.5) / count) for k in range(count)]


def test_a_video_that_is_fit_is_sent_as_it_is(tmp_path: Path) -> None:
    data = video(8, fps=2, sound=3)
    whole = FrameSampling(fps=2, max_frames=8)

    def untouched(data: bytes, sampling: FrameSampling, **options: Any) -> bool:
        return clip_of(load(data, sampling, as_video=True, **options)) == data

    assert untouched(data, whole)
    assert untouched(data, FrameSampling(fps=2, max_frames=8, end=4.0))
    assert untouched(data, FrameSampling(fps=2, max_frames=8, end=99.0))
    assert untouched(data, whole, max_pixels=64 * 64)
    for other in (
        FrameSampling(fps=2, max_frames=7),
        FrameSampling(fps=1.5, max_frames=8),
        FrameSampling(fps=2, max_frames=8, start=0.5),
        FrameSampling(fps=2, max_frames=8, end=3.5),
    ):
        assert not untouched(data, other)
    assert not untouched(data, whole, max_pixels=64 * 64 - 1)
    assert not untouched(video(1, fps=2), whole)
    assert not untouched(video(8, fps=2, rotation=90), whole)
    assert not untouched(video(8, fps=2, container="mov"), whole)
    assert not untouched(video(8, fps=2, container="matroska"), whole)
    assert not untouched(video(8, fps=2, codec="mpeg4"), whole)
    assert not untouched(video(8, fps=2, pixels="yuv420p10le"), whole)
    assert not untouched(video(8, fps=2, shape=Fraction(2)), whole)
    assert not untouched(data + bytes(MAX_UNTOUCHED_BYTES), whole)
