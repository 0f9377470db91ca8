"""Shards with videos that are none, or odd: each is told apart or captioned, and the rest goes on."""

from __future__ import annotations

import io
from typing import Any

import av
import pytest

from airflow_vlm_provider.types import Media
from tests.support.captioning import VIDEO
from tests.support.seeing_engine import SeeingEngine, kinds
from tests.support.video_place import THIRTY_SECONDS, VideoPlace, step, windows
from tests.support.videos import video


@pytest.fixture(scope="module")
def thirty_seconds():
    return video(300, fps=10)


@pytest.fixture
def place(tmp_path):
    return VideoPlace(tmp_path)


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=48000)
        for number in range(50):
            frame = av.AudioFrame(format=stream.codec_context.format.name, layout="stereo", samples=1024)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts = 48000, number * 1024
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("window_seconds", [None, 10])
@pytest.mark.parametrize("transport", ["auto", "frames"])
def test_videos_that_cannot_be_looked_at_are_told_apart_and_the_others_are_captioned(
    place, thirty_seconds, window_seconds, transport
):
    good = place.put(a=thirty_seconds)
    bad = place.put(
        empty=b"",
        truncated=thirty_seconds[: len(thirty_seconds) // 2],
        sound=audio_only(),
        text=b"This is not a video at all. " * 100,
    )
    missing = [{"id": "gone", "text": VIDEO, "videos": ["gone.mp4"]}]
    engine = SeeingEngine()
    shard = place.shard("a.jsonl", [*bad, *missing, *good])
    (manifest,) = place.run(engine, shard, step=step(window_seconds=window_seconds, transport=transport))
    assert {name: letter["kind"] for name, letter in place.letters().items()} == {
        "empty": "media_corrupt",
        "truncated": "media_corrupt",
        "sound": "media_unsupported",
        "text": "media_corrupt",
        "gone": "media_missing",
    }
    assert (manifest.counts.rows_in, manifest.counts.ok, manifest.counts.failed) == (6, 1, 5)
    messages = [letter["message"] for letter in place.letters().values()]
    assert len(set(messages)) == 5
    assert {row["id"]: row for row in place.output()}["empty"] == bad[0]
    # None of them costs anything, this time or the next.
    assert {"saw 75 225"} | {*THIRTY_SECONDS, "in all 25 75 125 175 225 275"} >= set(engine.seen)
    place.forget()
    assert (
        place.run_what_is_left(engine, shard, step=step(window_seconds=window_seconds, transport=transport))
        == []
    )
    assert place.loader.fetched == {}


def test_a_video_whose_end_is_missing_is_never_captioned_with_what_is_not_there(place):
    # Fragments, each with a table of its own, so that what is there can be decoded.
    whole = video(300, fps=10, muxer={"movflags": "frag_keyframe+empty_moov"})
    shard = place.shard("a.jsonl", place.put(a=whole[: len(whole) // 2], b=whole))
    (manifest,) = place.run(SeeingEngine(), shard, step=step(window_seconds=10))
    said = place.captions()
    assert said["b"] == "in all 25 75 125 175 225 275"
    # What is left of it is a shorter video: every picture of it stands where it stood.
    assert manifest.counts.ok == 2
    shown = [int(number) for number in said["a"].removeprefix("in all ").split()]
    assert shown[:2] == [25, 75]
    (found,) = (windows(row)[0] for row in place.output() if row["id"] == "a")
    assert 10 < found[-1][1] < 20
    assert shown[-1] <= 10 * found[-1][1]


@pytest.mark.parametrize("window_seconds", [None, 10])
def test_a_video_of_one_picture(place, window_seconds):
    shard = place.shard("a.jsonl", place.put(a=video(1, fps=10)))
    place.run(SeeingEngine(), shard, step=step(window_seconds=window_seconds))
    (row,) = place.output()
    # Twice, because readers of clips see nothing of a single picture.
    assert place.captions() == {"a": "saw 0 0"}
    if window_seconds:
        assert windows(row) == [[(0, 0.1, "saw 0 0")]]


def test_a_video_on_its_side_is_shown_upright(place):
    size = (96, 64)
    engine = SeeingEngine(lambda seen: "something")
    shard = place.shard("a.jsonl", place.put(a=video(100, fps=10, size=size, rotation=90)))
    place.run(engine, shard, step=step(transport="frames"))
    from PIL import Image

    sizes = {
        Image.open(io.BytesIO(part.data)).size
        for request in engine.requests
        for part in request.parts
        if isinstance(part, Media)
    }
    assert sizes == {(64, 96)}


@pytest.mark.parametrize("transport", ["auto", "frames"])
def test_windows_of_a_video_whose_pictures_come_at_odd_times(place, transport):
    # Ten a second, then nothing new for half a minute, then one a second.
    times = [n / 10 for n in range(100)] + [40.0 + n for n in range(20)]
    shard = place.shard("a.jsonl", place.put(a=video(times=times, last=1.0, gop=30, b_frames=0)))
    place.run(SeeingEngine(), shard, step=step(window_seconds=10, transport=transport))
    (row,) = place.output()
    assert windows(row) == [
        [
            (0, 10, "saw 25 75"),
            # The last picture is shown for as long as no other comes.
            (10, 20, "saw 99 99"),
            (20, 30, "saw 99 99"),
            (30, 40, "saw 99 99"),
            (40, 50, "saw 102 107"),
            (50, 60, "saw 112 117"),
        ]
    ]


def test_sound_that_goes_on_after_the_last_picture_makes_no_windows(place):
    shard = place.shard("a.jsonl", place.put(a=video(100, fps=10, sound=25.0)))
    place.run(SeeingEngine(), shard, step=step(window_seconds=10))
    assert place.captions() == {"a": "saw 25 75"}
    assert windows(place.output()[0]) == [[(0, 10, "saw 25 75")]]


def test_ten_hours_are_captioned_with_bounded_requests_each_of_a_few_pictures(place):
    # A picture a minute. More is not needed to find the right ones after hours.
    shard = place.shard("a.jsonl", place.put(a=video(times=[60.0 * n for n in range(600)], last=60.0)))
    looked_at = {"fps": 1 / 600, "max_frames": 3, "transport": "frames", "window_seconds": 1800}
    engine = SeeingEngine()
    (manifest,) = place.run(engine, shard, step=step(**looked_at))
    assert (manifest.counts.ok, len(engine.requests)) == (1, 21)
    (found,) = windows(place.output()[0])
    assert len(found) == 20
    assert found[0] == (0, 1800, "saw 5 15 25")
    assert found[19] == (34200, 36000, "saw 575 585 595")
    assert max(len(kinds(request)) for request in engine.requests) == 3


def test_more_windows_than_anybody_wants_are_refused_before_any_is_asked_about(place):
    shard = place.shard("a.jsonl", place.put(a=video(times=[0.0, 20_000.0], last=1.0)))
    engine = SeeingEngine()
    place.run(engine, shard, step=step(window_seconds=1))
    letter = place.letters()["a"]
    assert (letter["kind"], engine.requests) == ("media_too_large", [])
    assert "window_seconds" in letter["message"]
