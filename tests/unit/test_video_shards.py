"""Captioning whole shards of videos, real files from reading to writing; only the model is none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, TransientError
from airflow_vlm_provider.shards.formats import RowKeys
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from airflow_vlm_provider.types import Choice, Media
from tests.support.captioning import EOC, LOOP, REFUSAL, VIDEO
from tests.support.parquet_shards import parquet
from tests.support.place import Place
from tests.support.seeing_engine import SeeingEngine, kinds
from tests.support.tars import tar
from tests.support.videos import video

META = "__dj__meta__"
# Thirty seconds, ten pictures each: two looked at of every window of ten seconds show 25 and 75, and so on.
LOOKED_AT = {"fps": 0.2, "max_frames": 2, "keep_original_sample": False}
THIRTY_SECONDS = "saw 25 75", "saw 125 175", "saw 225 275"


class CountingLoader(MediaLoader):
    """Counts what is done with files."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fetched: Counter[str] = Counter()
        self.probed: Counter[str] = Counter()

    def fetch(self, ref: Any, **where: Any) -> Any:
        self.fetched[ref.ref] += 1
        return super().fetch(ref, **where)

    def probe(self, source: Any) -> Any:
        self.probed[source.ref] += 1
        return super().probe(source)


class VideoPlace(Place):
    """A place whose media are files."""

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root)
        self.options = options
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.loader = CountingLoader(source_uri=str(self.source_path), **self.options)
        self.media = self.loader  # type: ignore[assignment]

    def put(self, **videos: bytes) -> list[dict[str, Any]]:
        """Put videos there, and return a row for each."""
        for name, data in videos.items():
            (self.source_path / f"{name}.mp4").write_bytes(data)
        return [{"id": name, "text": f"{VIDEO} old {EOC}", "videos": [f"{name}.mp4"]} for name in videos]

    def letters(self) -> dict[str, dict[str, Any]]:
        """Dead letters by the name of their video."""
        path = self.destination_path / "_vlm" / "a.jsonl" / "video_captioning" / "errors.jsonl"
        letters = [json.loads(line) for line in path.read_text().splitlines()]
        return {letter["media"].removesuffix(".mp4"): letter for letter in letters}

    def captions(self) -> dict[str, str]:
        """What stands in the texts, by the name of the row."""
        return {row["id"]: row["text"].replace(VIDEO, "").replace(EOC, "").strip() for row in self.output()}


@pytest.fixture(scope="module")
def thirty_seconds():
    return video(300, fps=10)


@pytest.fixture
def place(tmp_path):
    return VideoPlace(tmp_path)


def step(**given: Any) -> VideoCaptioningStep:
    return VideoCaptioningStep(**{**LOOKED_AT, **given})


def windows(row: dict[str, Any]) -> list[list[tuple[float, float, str]]]:
    return [
        [(each["start"], each["end"], each["caption"]) for each in one] for one in row[META]["video_windows"]
    ]


@pytest.mark.parametrize("transport", ["auto", "video", "frames"])
def test_windows_show_what_they_are_of_however_it_is_sent(place, thirty_seconds, transport):
    engine = SeeingEngine()
    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    (manifest,) = place.run(engine, shard, step=step(window_seconds=10, transport=transport))
    assert (manifest.counts.ok, manifest.counts.requests) == (1, 4)
    (row,) = place.output()
    assert windows(row) == [
        [(0, 10, THIRTY_SECONDS[0]), (10, 20, THIRTY_SECONDS[1]), (20, 30, THIRTY_SECONDS[2])]
    ]
    assert place.captions() == {"a": "in all 25 75 125 175 225 275"}
    sent = ["image", "image"] if transport == "frames" else ["video"]
    assert [kinds(request) for request in engine.requests] == [sent, sent, sent, []]
    assert (place.loader.fetched, place.loader.probed) == ({"a.mp4": 1}, {"a.mp4": 1})


def test_without_windows_a_video_is_one_request(place, thirty_seconds):
    engine = SeeingEngine()
    rows = place.put(a=thirty_seconds)
    (manifest,) = place.run(engine, place.shard("a.jsonl", rows), step=step(max_frames=2, caption_num=4))
    assert (manifest.counts.requests, [request.n for request in engine.requests]) == (1, [4])
    assert place.captions() == {"a": "saw 75 225"}
    assert META not in place.output()[0]


def test_where_the_model_takes_no_videos_it_is_sent_their_frames(place, thirty_seconds):
    engine = SeeingEngine(model_takes_video=False)
    rows = place.put(a=thirty_seconds, b=video(100, fps=10))
    (manifest,) = place.run(engine, place.shard("a.jsonl", rows), step=step(window_seconds=10))
    assert manifest.counts.ok == 2
    assert place.captions() == {"a": "in all 25 75 125 175 225 275", "b": "saw 25 75"}
    assert {tuple(kinds(request)) for request in engine.requests} == {("image", "image"), ()}
    said = next(part for request in engine.requests for part in request.parts if kinds(request))
    assert isinstance(said, str)
    assert "frames of one video" in said


def test_where_videos_have_to_be_sent_as_such_the_task_says_what_to_change(place, thirty_seconds):
    engine = SeeingEngine(model_takes_video=False)
    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    with pytest.raises(ConfigError, match="transport='frames'"):
        place.run(engine, shard, step=step(transport="video"))


def test_a_run_again_asks_and_reads_nothing(place, thirty_seconds):
    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    place.run(SeeingEngine(), shard, step=step(window_seconds=10))
    before = place.output()
    for changes in ({}, {"keep_original_sample": True}):
        place.forget()
        engine = SeeingEngine()
        place.run_what_is_left(engine, shard, step=step(window_seconds=10, **changes))
        assert (engine.requests, place.loader.fetched, place.loader.probed) == ([], {}, {})
    assert place.output()[1:] == before


def test_a_video_replaced_under_its_name_is_asked_about_again_and_no_other(place, thirty_seconds):
    rows = place.put(a=thirty_seconds, b=thirty_seconds[:], c=video(100, fps=10))
    shard = place.shard("a.jsonl", rows)
    place.run(SeeingEngine(), shard, step=step(window_seconds=10))
    place.put(a=video(200, fps=10))
    place.forget()
    engine = SeeingEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=step(window_seconds=10))
    assert (manifest.counts.cached, manifest.counts.ok) == (2, 1)
    assert engine.seen == ["in all 25 75 125 175", "saw 125 175", "saw 25 75"]
    assert place.captions()["a"] == "in all 25 75 125 175"
    assert set(place.loader.fetched) == {"a.mp4"}


def test_windows_of_videos_that_are_the_same_are_asked_about_once(place, thirty_seconds):
    rows = place.put(a=thirty_seconds, b=thirty_seconds)
    engine = SeeingEngine()
    (manifest,) = place.run(engine, place.shard("a.jsonl", rows), step=step(window_seconds=10))
    assert manifest.counts.requests == len(engine.requests) == 4
    assert len(set(place.captions().values())) == 1


# Windows that fail


def test_of_a_video_with_a_refused_window_nothing_else_is_asked_again(place, thirty_seconds):
    shard = place.shard("a.jsonl", place.put(a=thirty_seconds, b=video(100, fps=10)))
    refuses = SeeingEngine(lambda seen: REFUSAL if seen == THIRTY_SECONDS[1] else seen)
    (manifest,) = place.run(refuses, shard, step=step(window_seconds=10, try_num=2))
    assert manifest.kinds == {"refused": 1}
    letter = place.letters()["a"]
    assert (letter["kind"], len(letter["keys"])) == ("refused", 1)
    # A plain run again leaves it at that; nothing is asked behind anybody's back.
    engine = SeeingEngine()
    place.run_what_is_left(engine, shard, step=step(window_seconds=10, try_num=2))
    assert engine.requests == []
    (manifest,) = place.run_what_is_left(
        engine, shard, step=step(window_seconds=10, try_num=2), failed_only=True
    )
    assert engine.seen == ["in all 25 75 125 175 225 275", THIRTY_SECONDS[1]]
    assert (manifest.counts.failed, manifest.counts.requests) == (0, 2)
    assert place.captions() == {"a": "in all 25 75 125 175 225 275", "b": "saw 25 75"}


def test_a_refused_summary_is_asked_for_again_by_itself(place, thirty_seconds):
    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    refuses = SeeingEngine(lambda seen: Choice("No.", "refusal") if "in all" in seen else seen)
    (manifest,) = place.run(refuses, shard, step=step(window_seconds=10, try_num=1))
    assert manifest.kinds == {"refused": 1}
    engine = SeeingEngine()
    place.run_what_is_left(engine, shard, step=step(window_seconds=10, try_num=1), failed_only=True)
    assert engine.seen == ["in all 25 75 125 175 225 275"]


def test_windows_that_could_not_be_answered_this_time_are_what_the_next_run_asks(place, thirty_seconds):
    def fail(seen: str) -> str:
        if seen == THIRTY_SECONDS[0]:
            raise TransientError("503", attempts=1)
        return seen

    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    (manifest,) = place.run(SeeingEngine(fail), shard, step=step(window_seconds=10))
    assert manifest.kinds == {"transient": 1}
    engine = SeeingEngine()
    place.run_what_is_left(engine, shard, step=step(window_seconds=10))
    assert engine.seen == ["in all 25 75 125 175 225 275", THIRTY_SECONDS[0]]


def test_when_the_engine_is_gone_half_way_through_a_video_its_windows_are_not_asked_about_again(place):
    shard = place.shard("a.jsonl", place.put(a=video(1000, fps=10, gop=50)))
    answered = []

    def until(seen: str) -> str:
        if len(answered) == 6:
            raise EngineError("gone")
        answered.append(seen)
        return seen

    with pytest.raises(EngineError):
        place.run(SeeingEngine(until), shard, step=step(window_seconds=10))
    place.forget()
    engine = SeeingEngine()
    place.run(engine, shard, step=step(window_seconds=10))
    assert len(engine.requests) == 10 - 6 + 1
    assert not set(answered) & set(engine.seen)
    assert place.loader.probed == {}


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.ledger.segments import read_segment
from airflow_vlm_provider.runner import ShardRunner
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from tests.support.seeing_engine import SeeingEngine, saw

source, destination = sys.argv[1:]

def saved():
    # What is still being written has another name.
    segments = Path(destination).rglob("journal/[0-9]*")
    return {line for path in segments for line in read_segment(path.read_bytes())}

class Killed(SeeingEngine):
    async def ask(self, request):
        if len(self.requests) == 5:
            # The probe is an answer, too.
            while len(saved()) < 6:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        print(saw(request), flush=True)
        return await super().ask(request)

async def run():
    runner = ShardRunner(
        step=VideoCaptioningStep(fps=0.2, max_frames=2, keep_original_sample=False, window_seconds=10),
        engine=Killed(),
        source=open_store(source),
        destination=open_store(destination),
        media=MediaLoader(source_uri=source),
        flush=FlushPolicy(answers=1),
    )
    async with runner.engine:
        await runner.run_all([runner.source.stat("a.jsonl")])

asyncio.run(run())
"""


def test_after_a_kill_in_the_middle_of_a_video_what_was_saved_is_not_asked_again(place):
    shard = place.shard("a.jsonl", place.put(a=video(1000, fps=10, gop=50)))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(place.source_path), str(place.destination_path)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == -9, run.stderr
    answered = run.stdout.splitlines()
    assert len(answered) == 5
    engine = SeeingEngine()
    (manifest,) = place.run(engine, shard, step=step(window_seconds=10))
    assert manifest.counts.ok == 1
    assert not set(answered) & set(engine.seen)
    assert (len(engine.requests), place.loader.probed) == (11 - 5, {})
    assert windows(place.output()[0])[0][9] == (90, 100, "saw 925 975")


def test_a_sample_error_of_the_engine_about_one_window_says_which_video(place, thirty_seconds):
    def refuse(seen: str) -> str:
        if seen == THIRTY_SECONDS[2]:
            raise SampleError("rejected", "the endpoint's filter", attempts=1)
        return seen

    shard = place.shard("a.jsonl", place.put(a=thirty_seconds))
    place.run(SeeingEngine(refuse), shard, step=step(window_seconds=10))
    letter = place.letters()["a"]
    assert (letter["kind"], len(letter["keys"])) == ("rejected", 1)


# Videos that are none, or odd


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


@pytest.mark.parametrize("window_seconds", [None, 10])
def test_answers_that_are_no_captions_are_told_apart_and_the_shard_goes_on(place, window_seconds):
    said = {0: "", 1: REFUSAL, 2: Choice("no", "refusal"), 3: Choice("A dog runs ov", "length"), 4: LOOP}
    # Each video shows another picture all the time.
    from tests.support.videos import numbered

    rows = place.put(
        **{
            f"v{n}": video(fps=10, times=[t / 10 for t in range(100)], pictures=[numbered(n)] * 100)
            for n in range(6)
        }
    )

    def answers(seen: str) -> str | Choice:
        return said.get(int(seen.split()[-1]), seen)

    shard = place.shard("a.jsonl", rows)
    (manifest,) = place.run(SeeingEngine(answers), shard, step=step(window_seconds=window_seconds, try_num=1))
    assert {name: letter["kind"] for name, letter in place.letters().items()} == {
        "v0": "empty_answer",
        "v1": "refused",
        "v2": "refused",
        "v3": "cut_short",
        "v4": "repetitive",
    }
    assert (manifest.counts.ok, place.captions()["v5"]) == (1, "saw 5 5")


# Other formats


def test_a_table_takes_the_windows_in_columns_with_types(place, thirty_seconds):
    rows = place.put(a=thirty_seconds, b=video(100, fps=10))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    (place.source_path / "a.parquet").write_bytes(parquet(columns))
    keys = RowKeys(objects=frozenset({META}))
    place.run(SeeingEngine(), place.source.stat("a.parquet"), step=step(window_seconds=10), row_keys=keys)
    table = pq.read_table(place.destination_path / "a.parquet")
    assert str(table.schema.field(META).type) == (
        "struct<video_windows: list<element: list<element: struct<start: double, end: double, caption: string>>>>"
    )
    one, two = table.to_pylist()
    assert [each["caption"] for each in one[META]["video_windows"][0]] == list(THIRTY_SECONDS)
    assert two[META]["video_windows"] == [[{"start": 0.0, "end": 10.0, "caption": "saw 25 75"}]]


def test_videos_in_a_tar_are_looked_at_without_being_unpacked(place, thirty_seconds):
    row = {"text": f"{VIDEO} old {EOC}"}
    members = [("one.mp4", thirty_seconds), ("one.json", json.dumps(row).encode())]
    (place.source_path / "a.tar").write_bytes(tar(*members))
    engine = SeeingEngine()
    (manifest,) = place.run(
        engine, place.source.stat("a.tar"), step=step(window_seconds=10), output="sidecar"
    )
    assert manifest.counts.ok == 1
    assert engine.seen == ["in all 25 75 125 175 225 275", *sorted(THIRTY_SECONDS)]
    (new,) = pq.read_table(place.destination_path / "a.parquet").to_pylist()
    assert len(new[META]["video_windows"][0]) == 3


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_file_is_left_behind_and_none_kept_open(place, thirty_seconds, tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    row = {"text": f"{VIDEO} old {EOC}"}
    members = [
        (f"{n}.{kind}", data)
        for n in range(20)
        for kind, data in (("mp4", video(100 + n, fps=10)), ("json", json.dumps(row).encode()))
    ]
    (place.source_path / "a.tar").write_bytes(tar(*members))
    before = open_files()
    (manifest,) = place.run(
        SeeingEngine(), place.source.stat("a.tar"), step=step(window_seconds=5), output="sidecar"
    )
    assert manifest.counts.ok == 20
    assert list(spool.iterdir()) == []
    assert open_files() <= before
