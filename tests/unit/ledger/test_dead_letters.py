from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.ledger import dead_letters
from airflow_vlm_provider.ledger.dead_letters import (
    DeadLetters,
    NotTriedAgainError,
    load_dead_letters,
    sample_id,
)
from airflow_vlm_provider.types import Outcome, Sample, Usage
from tests.support.memory_files import MemoryFiles

NAME = "_vlm/a.jsonl/s/errors.jsonl"


def sample(index: int, raw: bytes = b"", **options: Any) -> Sample:
    raw = raw or json.dumps({"row": index}).encode()
    return Sample(index, index + 1, {}, raw, **options)


def failed(each: Sample, kind: str = "unparsable", *, attempts: int = 3, sent: int | None = None) -> Outcome:
    error = SampleError(kind, f"{kind}!", media="x.jpg", attempts=attempts)
    return Outcome(each, "failed", error=error, usage=Usage(attempts if sent is None else sent))


def run(files: MemoryFiles, *outcomes: Outcome, keys: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One run of the shard, with what the runs before it left."""
    dead = DeadLetters(load_dead_letters(files, "a.jsonl", "s"))
    for outcome in outcomes:
        dead.add(outcome, keys)
    dead.save(files, "a.jsonl", "s")
    dead.close()
    return load_dead_letters(files, "a.jsonl", "s")


@pytest.fixture
def clock(monkeypatch):
    """The days on which runs happen."""
    days = iter(range(1, 30))

    class Clock(dead_letters.datetime):  # type: ignore[name-defined,misc]
        today = 0

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, cls.today, tzinfo=tz)

        @classmethod
        def next_day(cls) -> None:
            cls.today = next(days)

    Clock.next_day()
    monkeypatch.setattr(dead_letters, "datetime", Clock)
    return Clock


def test_they_say_who_and_why_and_keep_an_unparsable_row_whole():
    files, dead = MemoryFiles(), DeadLetters()
    bad = Sample(4, 7, None, b'{"text": \xff "\xed\xa0\x80', error="line 7 is not valid JSON")
    dead.add(Outcome(bad, "failed", error=SampleError("malformed_row", "line 7 is not valid JSON")))
    lost = Sample(5, 8, {"images": ["x.jpg"]}, b'{"images": ["x.jpg"]}')
    error = SampleError("media_missing", "there is no x.jpg", media="x.jpg")
    dead.add(Outcome(lost, "failed", error=error), keys=["k1", "k2", "k1"])
    name = dead.save(files, "a.jsonl", "s")
    first, second = map(json.loads, files.files[name].splitlines())
    assert name == NAME
    assert (first["row"], first["line"], first["kind"], first["media"]) == (4, 7, "malformed_row", None)
    assert first["raw"].startswith('{"text": \\xff')
    assert second["keys"] == ["k1", "k2"]
    assert "raw" not in second
    assert set(second) == {
        *("id", "row", "line", "media", "kind", "message", "attempts", "first", "last", "keys")
    }
    assert (dead.count, dict(dead.kinds)) == (2, {"malformed_row": 1, "media_missing": 1})
    dead.close()


def test_what_fails_again_keeps_its_first_time_and_adds_up_its_attempts(clock):
    files = MemoryFiles()
    run(files, failed(sample(0)), failed(sample(1), attempts=1))
    clock.next_day()
    kept, new = run(files, failed(sample(0), "refused", attempts=2), failed(sample(2)))
    assert (kept["attempts"], kept["first"], kept["last"]) == (
        5,
        "2026-01-01T00:00:00+00:00",
        "2026-01-02T00:00:00+00:00",
    )
    assert kept["kind"] == "refused"
    assert (new["attempts"], new["first"]) == (3, "2026-01-02T00:00:00+00:00")


def test_history_follows_a_row_that_was_moved(clock):
    files = MemoryFiles()
    run(files, failed(sample(0, b'{"a": 1}')), failed(sample(1, b'{"b": 1}')))
    clock.next_day()
    letters = run(files, failed(sample(8, b'{"b": 1}')), failed(sample(9, b'{"a": 1}')))
    assert [(each["row"], each["first"][:10]) for each in letters] == [(8, "2026-01-01"), (9, "2026-01-01")]


def test_rows_that_are_the_same_keep_a_history_each(clock):
    files, twin = MemoryFiles(), b'{"text": "twin"}'
    run(files, failed(sample(3, twin), attempts=1), failed(sample(7, twin), attempts=2))
    clock.next_day()
    third, seventh = run(files, failed(sample(3, twin), attempts=1), failed(sample(7, twin), attempts=1))
    assert (third["attempts"], seventh["attempts"]) == (2, 3)
    clock.next_day()
    (alone,) = run(files, failed(sample(7, twin), attempts=1))
    assert alone["attempts"] == 4, "the one in the same place"


def test_rows_that_are_the_same_keep_a_history_each_when_they_were_moved(clock):
    files, twin = MemoryFiles(), b'{"text": "twin"}'
    run(files, failed(sample(3, twin), attempts=1), failed(sample(7, twin), attempts=2))
    letters = run(files, failed(sample(4, twin), attempts=1), failed(sample(8, twin), attempts=1))
    assert [each["attempts"] for each in letters] == [2, 3]


def test_an_answer_out_of_the_journal_is_no_attempt(clock):
    files = MemoryFiles()
    run(files, failed(sample(0), attempts=3))
    (letter,) = run(files, failed(sample(0), attempts=3, sent=0))
    assert letter["attempts"] == 3


def test_what_was_not_tried_again_stays_as_it_was(clock):
    files = MemoryFiles()
    (letter,) = run(files, failed(sample(0), "media_corrupt", attempts=1), keys=("k",))
    clock.next_day()
    dead = DeadLetters([letter])
    moved = sample(5, sample(0).raw)
    assert dead.earlier(moved) == letter
    assert dead.earlier(sample(1)) is None
    dead.add(Outcome(moved, "failed", error=NotTriedAgainError(letter)))
    dead.save(files, "a.jsonl", "s")
    assert load_dead_letters(files, "a.jsonl", "s") == [{**letter, "row": 5, "line": 6}]
    assert dead.kinds == {"media_corrupt": 1}
    dead.close()


def test_a_sample_is_named_by_what_is_in_it_also_where_rows_have_no_bytes():
    row = {"text": "x", "blob": b"\xff", "images": ["a.jpg"]}
    typed = Sample(0, 1, row, key="0001")
    assert sample_id(typed) == sample_id(Sample(9, 10, dict(reversed(row.items())), key="0001"))
    assert sample_id(typed) != sample_id(Sample(0, 1, row, key="0002"))
    assert sample_id(typed) != sample_id(Sample(0, 1, {**row, "blob": b"\xfe"}, key="0001"))
    assert len(sample_id(typed)) == 16


def test_when_all_is_mended_what_was_there_is_emptied_and_nothing_is_written_for_nothing():
    files = MemoryFiles()
    assert DeadLetters().save(files, "a.jsonl", "s") is None
    assert files.files == {}
    assert run(files, failed(sample(0)))
    assert run(files) == []
    assert files.files[NAME] == b""


def test_what_can_not_be_read_is_left_out_and_said(caplog):
    files = MemoryFiles()
    assert load_dead_letters(files, "a.jsonl", "s") == []
    (letter,) = run(files, failed(sample(0)))
    wrong = {**letter, "attempts": "3"}
    torn = files.files[NAME] + b"[]\n\xff\n" + json.dumps(wrong).encode() + b"\n" + files.files[NAME][:40]
    files.put(NAME, torn)
    with caplog.at_level(logging.WARNING):
        assert load_dead_letters(files, "a.jsonl", "s") == [letter]
    assert "4 lines" in caplog.text


def test_only_so_many_are_read_back_but_an_outage_is_no_clean_record(caplog, monkeypatch):
    files = MemoryFiles()
    first, _ = run(files, failed(sample(0)), failed(sample(1)))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(dead_letters, "MAX_ERRORS_BYTES", len(files.files[NAME]) - 1)
        assert load_dead_letters(files, "a.jsonl", "s") == [first]
    assert "Only the first 1 dead letters" in caplog.text
    files.broken.add(NAME)
    with pytest.raises(ConnectionError):
        load_dead_letters(files, "a.jsonl", "s")


def test_of_twins_in_an_unchanged_shard_only_the_one_that_failed_did(clock):
    files, twin = MemoryFiles(), b'{"text": "twin"}'
    (letter,) = run(files, failed(sample(7, twin), "transient"))
    here, moved = DeadLetters([letter], in_place=True), DeadLetters([letter])
    assert here.earlier(sample(3, twin)) is None
    assert here.earlier(sample(7, twin)) == letter
    assert here.earlier(sample(7, b"{}")) is None
    assert moved.earlier(sample(3, twin)) == letter
