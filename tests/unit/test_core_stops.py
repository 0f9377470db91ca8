"""Runs that are stopped, stalled or broken off in a commit, and what they leave: nothing is asked twice."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider import shard_ledger
from airflow_vlm_provider.errors import ConfigError, ShardError
from airflow_vlm_provider.ledger import dead_letters, media_memory, segments
from airflow_vlm_provider.ledger.commit_index import CommitIndex
from airflow_vlm_provider.ledger.dead_letters import DeadLetters
from airflow_vlm_provider.ledger.journal import FlushPolicy, ShardJournal
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.media_memory import MediaRecorder
from airflow_vlm_provider.shard_output import ShardOutput
from airflow_vlm_provider.shards.opening import open_store
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place
from tests.support.text_rows import texts


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


STEPS = [
    (ShardJournal, "consolidate"),
    (KeyIndex, "add"),
    (ShardOutput, "publish"),
    (DeadLetters, "save"),
    (MediaRecorder, "save"),
    (shard_ledger, "save_manifest"),
    (CommitIndex, "add"),
    (ShardJournal, "retire"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_commit_that_breaks_off_anywhere_is_made_again_without_asking(
    place, monkeypatch, owner, name, when
):
    rows = [*texts("a", "bad"), {"images": ["x.png"]}, {"images": ["missing.png"]}, "no row"]
    step = CaptionStep(useless="useless")
    shard = place.shard("a.jsonl", rows)
    place.run(ScriptedEngine(lambda about: "useless" if about == "bad" else "old"), shard, step=step)
    rows[0] = {"text": "new"}
    shard = place.shard("a.jsonl", rows)
    plain = getattr(owner, name)

    def breaks(*args: Any, **options: Any) -> Any:
        if when == "after":
            plain(*args, **options)
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks)
        with pytest.raises(OSError, match="gone"):
            place.run_what_is_left(ScriptedEngine(lambda about: "fresh"), shard, step=step)
    engine = ScriptedEngine(lambda about: "must not be asked")
    place.run_what_is_left(engine, shard, step=step)
    assert engine.asked == []
    assert place.runner(engine, step).committed(shard) is not None
    assert [row.get("caption") for row in place.output()] == ["fresh", None, "old", None]
    assert [letter["kind"] for letter in place.errors()] == ["unparsable", "media_missing", "malformed_row"]


def test_a_destination_to_reuse_that_may_not_be_read_stops_before_anything_is_asked(
    place, tmp_path, monkeypatch
):
    def denied(folder: str = "") -> Any:
        raise PermissionError("denied")

    other = open_store(str(tmp_path / "other"))
    monkeypatch.setattr(other, "list", denied)
    engine = ScriptedEngine()
    with pytest.raises(PermissionError, match="denied"):
        place.run(engine, place.shard("a.jsonl", texts("a")), reuse=[other])
    assert engine.asked == []


@pytest.mark.parametrize("part", ["/journal/", "/keys/", "media.jsonl"])
def test_a_stop_does_not_wait_for_what_is_slow_to_be_read(place, monkeypatch, part):
    shard = place.shard("a.jsonl", [{"images": ["x"]}])
    place.run(ScriptedEngine(), shard)
    (place.destination_path / "a.jsonl").unlink()
    reached, go_on = threading.Event(), threading.Event()
    read, opened = place.destination.read, place.destination.open

    def hang(name: str) -> None:
        if part in name:
            reached.set()
            assert go_on.wait(60)

    def slow_read(name: str, *, max_bytes: int) -> bytes:
        hang(name)
        return read(name, max_bytes=max_bytes)

    def slow_open(name: str) -> Any:
        hang(name)
        return opened(name)

    monkeypatch.setattr(place.destination, "read", slow_read)
    monkeypatch.setattr(place.destination, "open", slow_open)

    async def go() -> float:
        runner = place.runner(ScriptedEngine())
        monkeypatch.setattr(runner, "_media_unchanged", lambda *args: True)
        runner.committed(shard)
        task = asyncio.create_task(runner.run_all([shard]))
        assert await asyncio.to_thread(reached.wait, 60)
        task.cancel()
        at = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - at

    try:
        assert asyncio.run(go()) < 5
    finally:
        go_on.set()


def test_when_one_request_of_a_row_stops_the_run_the_others_are_stopped_too(place):
    def answer(about: Any) -> str:
        if about == b"bad":
            raise ConfigError("the key was withdrawn")
        return "fine"

    engine = ScriptedEngine(answer, delay=lambda about: 0.05 if about == b"bad" else 600)

    async def go() -> None:
        async with engine:
            with pytest.raises(ConfigError):
                await place.runner(engine).run_all([shard])
            assert engine.in_flight == 0

    shard = place.shard("a.jsonl", [{"images": ["slow", "bad"]}])
    asyncio.run(go())


def test_segments_that_a_commit_has_put_together_go(place):
    shard = place.shard("a.jsonl", texts(*map(str, range(100))))
    engine = ScriptedEngine(delay=lambda about: 0.005)
    (manifest,) = place.run(engine, shard, flush=FlushPolicy(answers=10, seconds=60))
    (segment,) = manifest.journal
    assert segment.endswith("-all.jsonl.zst")
    assert [name for name in place.files() if "/journal/" in name] == [f"_vlm/a.jsonl/caption/{segment}"]


def test_a_run_leaves_no_files_open(place, monkeypatch):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    # Small spools are in memory, and so can't be told from ones that were closed.
    for module, name in (
        (dead_letters, "SPOOL_BYTES"),
        (media_memory, "SPOOL_BYTES"),
        (segments, "_SPOOL_BYTES"),
    ):
        monkeypatch.setattr(module, name, 1)
    rows = [{"images": ["x"]}, {"images": ["missing"]}, {"text": "t"}]
    shards = [place.shard(f"{i}.jsonl", rows) for i in range(3)]
    place.run(ScriptedEngine(), *shards)
    gc.collect()
    gc.disable()
    try:
        before = open_files()
        for i in range(5):
            place.run_what_is_left(ScriptedEngine(), *shards, step=CaptionStep(suffix=str(i)))
        assert open_files() <= before + 2
    finally:
        gc.enable()


def test_while_nothing_can_be_saved_no_more_is_asked_than_the_window_and_what_stands_ready(
    place, monkeypatch
):
    plain, go_on = place.destination.create, threading.Event()

    def stalled(name: str) -> Any:
        if "/journal/" in name:
            assert go_on.wait(60)
        return plain(name)

    monkeypatch.setattr(place.destination, "create", stalled)
    shards = [place.shard(f"{n}.jsonl", texts(*(f"{n}-{i}" for i in range(100)))) for n in range(3)]

    async def go() -> int:
        engine = ScriptedEngine(concurrency=4)
        async with engine:
            runner = place.runner(engine, flush=FlushPolicy(answers=20, seconds=60))
            task = asyncio.create_task(runner.run_all(shards))
            asked = -1
            while asked < 20 or len(engine.asked) > asked:
                asked = len(engine.asked)
                await asyncio.sleep(0.3)
            go_on.set()
            await task
            return asked

    assert 20 < asyncio.run(go()) <= 20 + 4 + 8


def test_after_shards_that_cannot_be_opened_the_next_is_read(place):
    shards = [place.shard(f"{name}.jsonl", texts(name)) for name in "abc"]
    for name in "ab":
        (place.source_path / f"{name}.jsonl").unlink()
    with pytest.raises(ShardError, match="2 of 3 shards"):
        place.run(ScriptedEngine(), *shards)
    assert place.output("c.jsonl") == [{"text": "c", "caption": "about c"}]
