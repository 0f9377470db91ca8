from __future__ import annotations

import asyncio
import gc
import gzip
import json
import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from airflow_vlm_provider import shard_ledger, shard_run
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, ShardError
from airflow_vlm_provider.ledger.manifest import Counts, UnaccountedError
from airflow_vlm_provider.shards.jsonl import JsonLinesWriter
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_rows_come_out_in_order_with_all_their_fields_whatever_answers_first(place):
    rng = random.Random(1)
    rows = [{"id": i, "text": f"t{i}", "nested": {"ü": [1, None, 2.5]}} for i in range(500)]
    engine = ScriptedEngine(delay=lambda about: rng.random() * 0.02, concurrency=50)
    (manifest,) = place.run(engine, place.shard("a.jsonl", rows))
    assert place.output() == [{**row, "caption": f"about t{row['id']}"} for row in rows]
    assert manifest.counts == Counts(
        rows_in=500, rows_out=500, ok=500, requests=500, prompt_tokens=5000, completion_tokens=1000
    )
    assert engine.most_in_flight == 50


def test_rows_with_nothing_to_do_and_failed_ones_are_written_back_byte_for_byte(place):
    odd = '{"caption":"there",   "big": 123456789012345678901234567890, "f": 1.0e0}'
    failed = '{ "text" : "t", "images": ["missing.png"] }'
    (manifest,) = place.run(ScriptedEngine(), place.shard("a.jsonl", [odd, failed, {"text": "x"}]))
    lines = (place.destination_path / "a.jsonl").read_text().splitlines()
    assert lines[:2] == [odd, failed]
    assert (manifest.counts.skipped, manifest.counts.failed, manifest.counts.ok) == (1, 1, 1)


def test_a_bad_row_becomes_a_dead_letter_and_stops_nobody(place):
    rows = [
        {"text": "one"},
        '{"text": broken',
        {"images": ["missing.png"]},
        {"text": "two", "break": "step"},
        {"text": "three"},
    ]
    (manifest,) = place.run(ScriptedEngine(), place.shard("a.jsonl", rows))
    assert [(e["row"], e["line"], e["kind"], e["media"]) for e in place.errors()] == [
        (1, 2, "malformed_row", None),
        (2, 3, "media_missing", "missing.png"),
        (3, 4, "internal", None),
    ]
    assert [row.get("caption") for row in place.output()] == ["about one", None, None, "about three"]
    counts = manifest.counts
    assert (counts.rows_in, counts.rows_out, counts.ok, counts.failed) == (5, 4, 2, 3)
    assert manifest.errors.endswith("_vlm/a.jsonl/caption/errors.jsonl")


def test_a_row_that_the_format_cannot_hold_is_a_dead_letter_and_written_back(place):
    class Odd(CaptionStep):
        def process(self, sample: Any) -> Any:
            result = yield from super().process(sample)
            if sample.row["text"] == "b":
                return replace(result, rows=({**result.rows[0], "caption": {1, 2}},))
            return result

    shard = place.shard("a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    (manifest,) = place.run(ScriptedEngine(), shard, step=Odd())
    assert [row.get("caption") for row in place.output()] == ["about a", None, "about c"]
    (letter,) = place.errors()
    assert (letter["row"], letter["kind"]) == (1, "unwritable")
    assert (manifest.counts.ok, manifest.counts.failed, manifest.counts.requests) == (2, 1, 3)


def test_a_multi_image_row_that_fails_has_its_paid_answers_counted(place):
    (manifest,) = place.run(
        ScriptedEngine(), place.shard("a.jsonl", [{"images": ["a", "missing", "b"], "text": ""}])
    )
    assert (manifest.counts.failed, manifest.counts.requests) == (1, 2)


def test_media_reach_the_engine_loaded_and_in_order(place):
    engine = ScriptedEngine(lambda about: about.decode())
    place.run(engine, place.shard("a.jsonl", [{"images": ["x", "y", "x"]}, {"images": ["z"]}]))
    assert [row["caption"] for row in place.output()] == ["x y x", "z"]


def test_a_shard_that_is_done_is_known_as_done_until_anything_changes(place):
    rows = [{"text": "one"}, {"text": "two"}]
    shard = place.shard("a.jsonl", rows)
    engine = ScriptedEngine()
    place.run(engine, shard)
    assert place.runner(engine).committed(shard).counts.ok == 2
    assert place.runner(engine, overwrite=True).committed(shard) is None
    assert place.runner(engine, CaptionStep("Other words.")).committed(shard) is None
    assert place.runner(engine).committed(place.shard("a.jsonl", [*rows, {"text": "three"}])) is None
    place.run(engine, place.source.stat("a.jsonl"))
    assert place.runner(engine).committed(place.source.stat("a.jsonl")) is not None
    (place.destination_path / "a.jsonl").write_text("tampered with\n")
    assert place.runner(engine).committed(place.source.stat("a.jsonl")) is None
    (place.destination_path / "a.jsonl").unlink()
    assert place.runner(engine).committed(place.source.stat("a.jsonl")) is None


def test_a_shard_with_failures_is_not_done_and_mended_rows_empty_its_dead_letters(place):
    shard = place.shard("a.jsonl", [{"text": "one"}])

    def fail(about: Any) -> str:
        raise SampleError("refused", "no", attempts=1)

    (manifest,) = place.run(ScriptedEngine(fail), shard)
    assert len(place.errors()) == 1
    assert manifest.counts.requests == 1, "what was sent in vain counts, too"
    assert place.runner(ScriptedEngine(), max_error_rate=0.9).committed(shard) is None
    (manifest,) = place.run(ScriptedEngine(), shard)
    assert place.errors() == []
    assert manifest.errors is None
    assert place.runner(ScriptedEngine()).committed(shard) is not None


@pytest.mark.parametrize("error", [ConfigError("wrong key"), EngineError("gone"), OSError("disk full")])
def test_what_is_no_samples_fault_stops_at_once_and_leaves_nothing(place, error):
    def answer(about: Any) -> str:
        if about == "t40":
            raise error
        return "fine"

    # The first row hangs: a failure behind it must not wait for it.
    engine = ScriptedEngine(answer, delay=lambda about: 600 if about == "t0" else 0.001)
    shard = place.shard("a.jsonl", [{"text": f"t{i}"} for i in range(5000)])
    started = time.monotonic()
    with pytest.raises(type(error)):
        place.run(engine, shard)
    assert time.monotonic() - started < 60
    assert len(engine.asked) < 200
    assert place.committed_files() == set()


def test_an_error_stops_the_requests_of_other_open_shards_too(place):
    def answer(about: Any) -> str:
        if about == "bad":
            raise EngineError("gone")
        return "fine"

    engine = ScriptedEngine(answer, delay=lambda about: 0.3 if about == "bad" else 600)
    shards = [place.shard("a.jsonl", [{"text": "bad"}]), place.shard("b.jsonl", [{"text": "slow"}])]
    with pytest.raises(EngineError):
        place.run(engine, *shards)
    assert engine.in_flight == 0
    assert place.committed_files() == set()


async def sent_once_all_know(engine: ScriptedEngine) -> int:
    """How many requests were sent when a cancellation has come to all tasks: each is a turn of the loop further down."""
    for _ in range(10):
        await asyncio.sleep(0)
    return len(engine.asked)


def test_cancelling_stops_sending_and_leaves_nothing_behind(place):
    shards = [place.shard(f"{n}.jsonl", [{"text": f"{n}-{i}"} for i in range(300)]) for n in range(3)]
    engine = ScriptedEngine(delay=lambda about: 0.05)

    async def go() -> None:
        async with engine:
            task = asyncio.create_task(place.runner(engine).run_all(shards))
            await asyncio.sleep(0.5)
            task.cancel()
            sent = await sent_once_all_know(engine)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.in_flight == 0
            await asyncio.sleep(0.3)
            assert len(engine.asked) == sent

    asyncio.run(go())
    assert len(engine.asked) > 8
    assert place.committed_files() == set()


def test_cancelling_stops_the_sending_also_while_a_write_blocks(place, monkeypatch):
    engine = ScriptedEngine(delay=lambda about: 0.01)
    shard = place.shard("a.jsonl", [{"text": str(i)} for i in range(5000)])
    writing = threading.Event()
    plain = JsonLinesWriter.write

    def blocking(self: Any, sample: Any, rows: Any) -> None:
        writing.set()
        time.sleep(0.5)
        plain(self, sample, rows)

    monkeypatch.setattr(JsonLinesWriter, "write", blocking)

    async def go() -> float:
        async with engine:
            task = asyncio.create_task(place.runner(engine).run_all([shard]))
            assert await asyncio.to_thread(writing.wait, 30)
            await asyncio.sleep(0.1)
            task.cancel()
            at = time.monotonic()
            sent = await sent_once_all_know(engine)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(engine.asked) == sent
            return time.monotonic() - at

    assert asyncio.run(go()) < 5
    assert place.committed_files() == set()


def test_a_commit_that_fails_is_noticed_while_the_next_shard_is_read(place, monkeypatch):
    def full_disk(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_ledger, "save_manifest", full_disk)
    engine = ScriptedEngine(delay=lambda about: 0.05, concurrency=4)
    shards = [
        place.shard("a.jsonl", [{"text": "x"}]),
        place.shard("b.jsonl", [{"text": f"{i}"} for i in range(3000)]),
        place.shard("c.jsonl", [{"text": "x"}]),
    ]
    with pytest.raises(OSError, match="No space left"):
        place.run(engine, *shards)
    assert len(engine.asked) < 300


def test_a_shard_deleted_meanwhile_fails_alone(place):
    shards = [place.shard(f"{name}.jsonl", [{"text": "x"}] * 10) for name in "abc"]
    (place.source_path / "b.jsonl").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards .*b\.jsonl"):
        place.run(ScriptedEngine(), *shards)
    assert {"a.jsonl", "c.jsonl"} <= place.files()


def test_dead_letters_of_an_attempt_that_never_committed_do_not_stay(place, monkeypatch):
    def fail(about: Any) -> str:
        raise SampleError("refused", "no", attempts=1)

    shard = place.shard("a.jsonl", [{"text": "one"}])
    with monkeypatch.context() as patch:
        patch.setattr(shard_ledger, "save_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            place.run(ScriptedEngine(fail), shard)
    assert len(place.errors()) == 1
    (manifest,) = place.run(ScriptedEngine(), shard)
    assert (manifest.errors, place.errors()) == (None, [])


def test_an_error_is_raised_once_and_not_logged_for_every_request_in_flight(place, caplog):
    def fail(about: Any) -> str:
        raise ConfigError("wrong key")

    with pytest.raises(ConfigError):
        place.run(ScriptedEngine(fail), place.shard("a.jsonl", [{"text": "x"}] * 100))
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_the_window_stays_full_across_small_shards(place):
    shards = [place.shard(f"{n:02}.jsonl", [{"text": f"{n}-{i}"} for i in range(6)]) for n in range(20)]
    engine = ScriptedEngine(delay=lambda about: 0.05, concurrency=12)
    manifests = place.run(engine, *shards)
    assert engine.most_in_flight == 12
    assert [m.input["uri"].rpartition("/")[2] for m in manifests] == [s.name for s in shards]
    for shard in shards:
        assert len(place.output(shard.name)) == 6


def test_finished_rows_that_wait_for_a_slow_one_are_bounded(place, monkeypatch):
    monkeypatch.setattr(shard_run, "BACKLOG_ROWS", 40)
    gate: list[int] = []
    engine = ScriptedEngine(delay=lambda about: 1.0 if about == "t0" else 0.0, concurrency=4)
    engine.answer = lambda about: gate.append(len(engine.asked)) or "x" if about == "t0" else "x"
    place.run(engine, place.shard("a.jsonl", [{"text": f"t{i}"} for i in range(2000)]))
    assert gate[0] <= 40 + 2 + engine.concurrency + 8
    assert len(place.output()) == 2000


def test_finished_rows_that_wait_are_bounded_in_bytes(place, monkeypatch):
    monkeypatch.setattr(shard_run, "BACKLOG_BYTES", 100_000)
    gate: list[int] = []
    engine = ScriptedEngine(delay=lambda about: 1.0 if about == "t0" else 0.0, concurrency=4)
    engine.answer = lambda about: gate.append(len(engine.asked)) or "x" if about == "t0" else "x"
    rows = [{"text": f"t{i}", "ballast": "x" * 10_000} for i in range(300)]
    place.run(engine, place.shard("a.jsonl", rows))
    assert gate[0] < 30
    assert len(place.output()) == 300


def test_a_run_that_does_not_add_up_raises_and_commits_nothing(place, monkeypatch):
    def forgetful(self: Counts, outcome: Any, *, rows_out: int) -> None:
        if outcome.sample.index != 3:
            self.ok += 1

    monkeypatch.setattr(Counts, "add", forgetful)
    with pytest.raises(UnaccountedError):
        place.run(ScriptedEngine(), place.shard("a.jsonl", [{"text": f"t{i}"} for i in range(10)]))
    assert place.committed_files() == set()


def test_a_shard_replaced_while_it_is_read_is_not_committed(place):
    shard = place.shard("a.jsonl", [{"text": f"t{i}"} for i in range(10)])
    engine = ScriptedEngine(delay=lambda about: 0.3)

    async def go() -> None:
        async with engine:
            task = asyncio.create_task(place.runner(engine).run_all([shard]))
            await asyncio.sleep(0.1)
            place.shard("a.jsonl", [{"text": "another"}])
            await task

    with pytest.raises(ShardError, match="replaced or deleted while"):
        asyncio.run(go())
    assert place.committed_files() == set()


def test_a_shard_that_cannot_be_read_fails_alone_and_is_named(place):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)), mtime=0)
    (place.source_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    good = [place.shard(f"{name}.jsonl", [{"text": "x"}] * 10) for name in "ac"]
    shards = [good[0], place.source.stat("b.jsonl.gz"), good[1]]
    with pytest.raises(ShardError, match=r"1 of 3 shards .*/in/b\.jsonl\.gz"):
        place.run(ScriptedEngine(), *shards)
    assert {"a.jsonl", "c.jsonl"} <= place.files()
    assert not [name for name in place.committed_files() if "b.jsonl.gz" in name]


def test_an_empty_shard_is_committed_empty(place):
    (manifest,) = place.run(ScriptedEngine(), place.shard("a.jsonl", []))
    assert manifest.counts == Counts()
    assert (place.destination_path / "a.jsonl").read_bytes() == b""


def test_cost_and_author_stand_in_the_manifest(place):
    (manifest,) = place.run(
        ScriptedEngine(),
        place.shard("a.jsonl", [{"text": "a"}, {"text": "b"}]),
        prices=(1.5, 6.0),
        written_by={"dag_id": "d"},
    )
    assert manifest.counts.cost_usd == pytest.approx((20 * 1.5 + 4 * 6.0) / 1e6)
    stored = json.loads((place.destination_path / "_vlm/a.jsonl/caption/manifest.json").read_text())
    assert stored["dag_id"] == "d"
    assert stored["rows_in"] == stored["ok"] == 2


def test_progress_counts_rows_and_shares(place):
    engine = ScriptedEngine()
    runner = place.runner(engine)
    shards = [place.shard(f"{n}.jsonl", [{"text": "x"}] * 50) for n in range(2)]

    async def go() -> None:
        async with engine:
            await runner.run_all(shards)

    asyncio.run(go())
    now = runner.progress.snapshot()
    assert (now["rows"], now["shards_done"], now["percent"], now["seconds_left"]) == (100, 2, 100.0, 0)
    assert "2 of 2 shards committed, 100 rows done" in runner.progress.line()
