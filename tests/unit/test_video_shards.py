"""Captioning whole shards of videos, real files from reading to writing; only the model is none."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, TransientError
from airflow_vlm_provider.shards.formats import RowKeys
from airflow_vlm_provider.types import Choice
from tests.support.captioning import EOC, LOOP, REFUSAL, VIDEO
from tests.support.parquet_shards import parquet
from tests.support.seeing_engine import SeeingEngine, kinds
from tests.support.tars import tar
from tests.support.video_place import META, THIRTY_SECONDS, VideoPlace, step, windows
from tests.support.videos import video


@pytest.fixture(scope="module")
def thirty_seconds():
    return video(300, fps=10)


@pytest.fixture
def place(tmp_path):
    return VideoPlace(tmp_path)


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
