"""Where runs are cut short, cross each other, or share what they ask: nothing is lost, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from typing import Any

import pytest

from airflow_vlm_provider import shard_run
from airflow_vlm_provider.answering import Answering
from airflow_vlm_provider.bottleneck import Bottleneck
from airflow_vlm_provider.errors import EngineError, SampleError
from airflow_vlm_provider.ledger.changes import changes
from airflow_vlm_provider.ledger.dead_letters import DeadLetters
from airflow_vlm_provider.ledger.journal import FlushPolicy, ShardJournal
from airflow_vlm_provider.ledger.manifest import load_manifest
from airflow_vlm_provider.runner import is_settled
from airflow_vlm_provider.shard_ledger import ShardLedger
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.types import Request, Result
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place
from tests.support.text_rows import texts


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def says(**answers: str) -> ScriptedEngine:
    """An engine that says what is given for some, and ``about ...`` to the rest; a kind in brackets is raised."""

    def answer(about: Any) -> str:
        said = answers.get(about.decode() if isinstance(about, bytes) else about)
        if said is not None and said.startswith("<"):
            raise SampleError(said[1:-1], "no", attempts=1)
        return f"about {about}" if said is None else said

    return ScriptedEngine(answer)


def test_who_shares_a_request_that_fails_fails_for_the_same_reason(place):
    def refuse(about: Any) -> str:
        raise SampleError("refused", "the model declined", media="x.png", attempts=3)

    engine = ScriptedEngine(refuse, delay=lambda about: 0.05)
    (manifest,) = place.run(engine, place.shard("a.jsonl", texts(*["same"] * 5)))
    assert manifest.kinds == {"refused": 5}
    assert {(each["message"], each["media"]) for each in place.errors()} == {("the model declined", "x.png")}


def test_a_run_stopped_in_its_commit_never_gives_an_old_output_a_new_manifest(place, monkeypatch):
    shard = place.shard("a.jsonl", texts("one"))
    place.run(ScriptedEngine(), shard)
    monkeypatch.setattr(shard_run, "STOP_SECONDS", 0.05)
    reached, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    plain_consolidate, plain_commit = ShardJournal.consolidate, ShardLedger.commit

    def slow(self: Any) -> Any:
        reached.set()
        assert go_on.wait(60)
        return plain_consolidate(self)

    def watched(self: Any, *args: Any) -> Any:
        try:
            return plain_commit(self, *args)
        finally:
            ended.set()

    monkeypatch.setattr(ShardJournal, "consolidate", slow)
    monkeypatch.setattr(ShardLedger, "commit", watched)
    new = CaptionStep(suffix="!")

    async def go() -> None:
        engine = ScriptedEngine()
        async with engine:
            task = asyncio.create_task(place.runner(engine, new).run_all([shard]))
            assert await asyncio.to_thread(reached.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            assert await asyncio.to_thread(ended.wait, 60)

    asyncio.run(go())
    assert place.output() == [{"text": "one", "caption": "about one"}]
    assert place.runner(ScriptedEngine(), new).committed(shard) is None
    assert place.runner(ScriptedEngine()).committed(shard) is not None


def test_when_two_shards_fail_at_once_both_save_what_they_paid_for(place, monkeypatch):
    plain = place.destination.create

    def slow(name: str) -> Any:
        if "_vlm/b.jsonl/" in name:
            time.sleep(0.4)
        return plain(name)

    monkeypatch.setattr(place.destination, "create", slow)

    def answer(about: Any) -> str:
        if about.startswith("bad"):
            raise EngineError("gone")
        return "fine"

    engine = ScriptedEngine(answer, delay=lambda about: 0.3 if about.startswith("bad") else 0, concurrency=40)
    shards = [
        place.shard("a.jsonl", texts("bad a")),
        place.shard("b.jsonl", texts(*map(str, range(30)), "bad b")),
    ]
    with pytest.raises(EngineError):
        # Half of it is being written when the engine is gone, and the rest waits for that.
        place.run(engine, *shards, flush=FlushPolicy(answers=40, seconds=3600))
    assert "0" in engine.asked
    again = ScriptedEngine()
    place.run(again, *shards)
    assert sorted(again.asked) == ["bad a", "bad b"]


@pytest.mark.parametrize("when", ["after", "before", "with the record lost"])
@pytest.mark.parametrize("replaced", ["missing.png", "odd.png"])
def test_media_of_dead_letters_that_a_redrive_leaves_alone_are_still_looked_after(place, when, replaced):
    step = CaptionStep(useless="useless")
    rows = [{"text": "a"}, {"images": ["missing.png"]}, {"images": ["fine.png", "odd.png"]}]
    shard = place.shard("a.jsonl", rows)
    place.run(says(**{"a": "<transient>", "odd.png": "useless"}), shard, step=step)

    def replace_pictures() -> None:
        place.media.content[replaced] = b"another"

    if when == "before":
        replace_pictures()
    if when == "with the record lost":
        (place.destination_path / "_vlm/a.jsonl/caption/media.jsonl.zst").unlink()
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard, step=step, failed_only=True, kinds=["transient"])
    assert engine.asked == ["a"]
    assert [letter["kind"] for letter in place.errors()] == ["media_missing", "unparsable"]
    if when != "before":
        replace_pictures()
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard, step=step)
    assert engine.asked == [b"another"]


def test_a_redrive_takes_a_fine_rows_answer_although_a_dead_letter_shares_its_question(place):
    step = CaptionStep(useless="useless")
    shard = place.shard("a.jsonl", [{"images": ["x"]}, {"images": ["x", "y"]}])
    place.run(says(y="useless"), shard, step=step)
    engine = ScriptedEngine(lambda about: "new")
    (manifest,) = place.run_what_is_left(engine, shard, step=step, failed_only=True)
    assert engine.asked == [b"x", b"y"]
    assert (manifest.counts.failed, manifest.counts.ok, manifest.counts.cached) == (0, 1, 1)


def test_what_one_shard_was_answered_anew_another_does_not_ask_anew(place):
    step = CaptionStep(useless="useless")
    shards = [place.shard(f"{name}.jsonl", texts("same")) for name in "ab"]
    place.run(says(same="useless"), *shards, step=step)
    engine = ScriptedEngine()
    manifests = place.run_what_is_left(engine, *shards, step=step, failed_only=True)
    assert engine.asked == ["same"]
    assert [each.counts.failed for each in manifests] == [0, 0]


def test_however_many_failed_a_better_parser_reads_the_answers_again_first(place):
    shard = place.shard("a.jsonl", texts("a", "b"))
    place.run(says(a="odd", b="odd too"), shard, step=CaptionStep(useless="odd"))
    engine = ScriptedEngine()
    better = CaptionStep(suffix="!", useless="odd too")
    (manifest,) = place.run_what_is_left(engine, shard, step=better, max_error_rate=0.1)
    assert engine.asked == []
    assert (manifest.counts.cached, manifest.counts.failed) == (1, 1)
    place.run_what_is_left(engine, shard, step=better, max_error_rate=0.1)
    assert engine.asked == ["b"]


@pytest.mark.parametrize("failed", range(101))
def test_a_share_that_is_just_allowed_is_allowed_whatever_the_number(failed):
    rate = float(f"{failed / 100:.2f}")
    assert is_settled({"refused": failed}, failed=failed, rows_in=100, max_error_rate=rate)
    assert not is_settled({"refused": failed + 1}, failed=failed + 1, rows_in=100, max_error_rate=rate)


def test_a_share_that_is_just_allowed_asks_for_nothing_anew(place):
    step = CaptionStep(useless="useless")
    rows = texts(*(f"{'bad' if i < 29 else 'good'} {i}" for i in range(100)))
    engine = ScriptedEngine(lambda about: "useless" if about.startswith("bad") else "fine")
    place.run(engine, place.shard("a.jsonl", rows), step=step)
    rows[99] = {"text": "changed"}
    engine = ScriptedEngine()
    place.run_what_is_left(engine, place.shard("a.jsonl", rows), step=step, max_error_rate=0.29)
    assert engine.asked == ["changed"]


def test_a_destination_that_was_moved_is_made_again_without_asking(place, tmp_path):
    shard = place.shard("a.jsonl", texts("one"))
    place.run(ScriptedEngine(), shard)
    shutil.move(place.destination_path, tmp_path / "moved")
    place.destination_path = tmp_path / "moved"
    place.destination = open_store(str(place.destination_path))
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, shard)
    assert engine.asked == []
    assert manifest.counts.cached == 1
    assert place.run_what_is_left(engine, shard) == []


class Known:
    """What is known, without the rest of it."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes | None:
        return self.lines.get(key)

    def put(self, lines: Any) -> None:
        self.lines |= {line[8:40].decode(): line for line in lines}


class Journal:
    """A journal that is full until there is room."""

    def __init__(self, *, room: bool) -> None:
        self.appended: list[bytes] = []
        self.used: list[bytes] = []
        self.room, self.reached = asyncio.Event(), asyncio.Event()
        if room:
            self.room.set()

    async def append(self, line: bytes) -> None:
        self.appended.append(line)
        self.reached.set()
        await self.room.wait()

    def use(self, line: bytes) -> None:
        self.used.append(line)


async def answer(answering: Answering, journal: Any) -> Any:
    async def ready() -> Request:
        return Request(system=None, parts=("x",))

    key = "0" * 32
    return await answering.answer(key, lambda: answering.ask(key, ready), journal)


def test_an_answer_that_came_before_who_asked_was_stopped_is_not_asked_for_again():
    async def go() -> None:
        engine = ScriptedEngine()
        async with engine:
            answering: Any = Answering(engine=engine, answers=Known(), bottleneck=Bottleneck(lambda: 8))  # type: ignore[arg-type]
            full, other = Journal(room=False), Journal(room=True)
            first = asyncio.create_task(answer(answering, full))
            second = asyncio.create_task(answer(answering, other))
            await full.reached.wait()
            first.cancel()
            given = await second
            assert engine.asked == ["x"]
            assert not given.fresh
            assert other.used == full.appended

    asyncio.run(go())


def test_who_waits_for_an_answer_of_which_the_asker_was_stopped_asks_itself():
    async def go() -> None:
        engine = ScriptedEngine(delay=lambda about: 0 if len(engine.asked) > 1 else 600)
        async with engine:
            answering: Any = Answering(engine=engine, answers=Known(), bottleneck=Bottleneck(lambda: 8))  # type: ignore[arg-type]
            journal = Journal(room=True)
            first = asyncio.create_task(answer(answering, Journal(room=True)))
            second = asyncio.create_task(answer(answering, journal))
            await asyncio.sleep(0.05)
            assert engine.asked == ["x"]
            first.cancel()
            given = await second
            assert engine.asked == ["x", "x"]
            assert given.fresh
            assert len(journal.appended) == 1

    asyncio.run(go())


def test_a_manifest_is_of_the_output_that_its_own_run_wrote(place, monkeypatch):
    shard = place.shard("a.jsonl", texts("one"))
    plain = DeadLetters.save
    crossed = []

    def crossing(self: Any, *args: Any) -> Any:
        # Another attempt, with other parameters, commits between this one's output and its manifest.
        if not crossed:
            crossed.append(True)
            thread = threading.Thread(
                target=place.run, args=(ScriptedEngine(), shard), kwargs={"step": other}
            )
            thread.start()
            thread.join()
        return plain(self, *args)

    other = CaptionStep(suffix=" of the other")
    monkeypatch.setattr(DeadLetters, "save", crossing)
    place.run(ScriptedEngine(), shard)
    assert place.output() == [{"text": "one", "caption": "about one of the other"}]
    assert place.runner(ScriptedEngine()).committed(shard) is None
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard)
    assert engine.asked == []
    assert place.output() == [{"text": "one", "caption": "about one"}]


def test_what_was_paid_for_is_saved_though_other_journals_are_slow_to_read(place, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    yesterday = Place(tmp_path / "other")
    for i in range(12):
        yesterday.run(ScriptedEngine(), yesterday.shard(f"{i}.jsonl", texts(f"old {i}")))
    store = yesterday.destination
    plain, go_on = store.read, threading.Event()

    def slow(name: str, *, max_bytes: int) -> bytes:
        if "/journal/" in name:
            assert go_on.wait(60)
        return plain(name, max_bytes=max_bytes)

    monkeypatch.setattr(store, "read", slow)
    shard = place.shard("a.jsonl", texts(*(f"old {i}" for i in range(12)), "new"))

    async def go() -> bool:
        engine = ScriptedEngine(concurrency=20)
        async with engine:
            runner = place.runner(engine, reuse=[store], flush=FlushPolicy(seconds=0.01))
            task = asyncio.create_task(runner.run_all([shard]))
            deadline = time.monotonic() + 10
            saved = False
            while not saved and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
                saved = any("_vlm/a.jsonl/caption/journal/" in name for name in place.files())
            go_on.set()
            await task
            assert engine.asked == ["new"]
            return saved

    assert asyncio.run(go())


def test_what_a_step_asked_before_it_skipped_a_row_is_counted(place):
    class Choosy(CaptionStep):
        def process(self, sample: Any) -> Any:
            yield [Request(system=None, parts=(sample.row["text"], "worth it?"))]
            return Result(skipped=True)

    (manifest,) = place.run(ScriptedEngine(), place.shard("a.jsonl", texts("a")), step=Choosy())
    assert (manifest.counts.skipped, manifest.counts.requests) == (1, 1)


def test_a_tuple_in_a_parameter_is_no_change_and_true_is_not_one():
    def of(value: Any) -> Any:
        return {"step": {"stop": value}}

    before = json.loads(json.dumps(of(("a", "b"))))
    assert changes(before, of(("a", "b")), asking=["stop"]).asking == ()
    assert changes(of(1), of(True), asking=["stop"]).asking == ("stop",)


def test_answers_are_found_though_their_segment_was_replaced_since_the_index_was_read(place):
    place.run(ScriptedEngine(), place.shard("a.jsonl", texts("one")))
    engine = ScriptedEngine(delay=lambda about: 0.0)
    replaced = []

    def answer(about: Any) -> str:
        # Meanwhile another task adds a row to the first shard, and so replaces its segment.
        if about == "first" and not replaced:
            replaced.append(True)
            shard = place.shard("a.jsonl", texts("one", "two"))
            thread = threading.Thread(target=place.run, args=(ScriptedEngine(), shard))
            thread.start()
            thread.join()
        return "fine"

    engine.answer = answer

    class InTurn(CaptionStep):
        def process(self, sample: Any) -> Any:
            yield [Request(system=None, parts=("first", ""))]
            return (yield from super().process(sample))

    before = load_manifest(place.destination, "a.jsonl", "caption")
    place.run(engine, place.shard("b.jsonl", texts("one")), step=InTurn())
    after = load_manifest(place.destination, "a.jsonl", "caption")
    assert before is not None
    assert after is not None
    assert not set(before.journal) & set(after.journal)
    assert engine.asked == ["first"]
    assert place.output("b.jsonl")[0]["caption"] == "about one"
