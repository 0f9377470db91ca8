"""What one run has paid for, no other pays for again: the promises of the journal, without Airflow."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError, SampleError, ShardError
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.shards.opening import open_store
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place
from tests.support.text_rows import texts


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_a_shard_without_its_manifest_is_made_again_from_its_journal(place):
    shard = place.shard("a.jsonl", texts("one", "two", "three"))
    place.run(ScriptedEngine(), shard)
    first = place.output()
    for name in ("a.jsonl", "_vlm/a.jsonl/caption/manifest.json"):
        (place.destination_path / name).unlink()
    engine = ScriptedEngine(lambda about: "another answer")
    (manifest,) = place.run_what_is_left(engine, shard)
    assert engine.asked == []
    assert place.output() == first
    counts = manifest.counts
    assert (counts.rows_in, counts.cached, counts.ok, counts.requests) == (3, 3, 0, 0)
    assert (counts.prompt_tokens, counts.completion_tokens) == (0, 0)


def test_the_same_question_in_another_shard_is_not_asked(place):
    place.run(ScriptedEngine(), place.shard("a.jsonl", [{"images": ["x", "y"], "text": ""}]))
    place.media.content = {"moved/x.png": b"x", "z": b"z"}
    engine = ScriptedEngine(lambda about: "new")
    shard = place.shard("b.jsonl", [{"images": ["moved/x.png"], "id": 1}, {"images": ["z"]}])
    (manifest,) = place.run(engine, shard)
    assert engine.asked == [b"z"]
    assert [row["caption"] for row in place.output("b.jsonl")] == ["about b'x'", "new"]
    assert (manifest.counts.cached, manifest.counts.ok) == (1, 1)


def test_identical_requests_in_flight_are_sent_once(place):
    engine = ScriptedEngine(delay=lambda about: 0.05, concurrency=8)
    shards = [place.shard(f"{name}.jsonl", texts(*["same"] * 40)) for name in "ab"]
    manifests = place.run(engine, *shards)
    assert engine.asked == ["same"]
    assert sum(each.counts.requests for each in manifests) == 1
    assert sum(each.counts.ok for each in manifests) == 1
    assert sum(each.counts.cached for each in manifests) == 79


def test_when_the_one_that_was_sent_fails_the_others_fail_alike_and_pay_nothing(place):
    def refuse(about: Any) -> str:
        raise SampleError("refused", "no", attempts=3)

    engine = ScriptedEngine(refuse, delay=lambda about: 0.05, concurrency=8)
    (manifest,) = place.run(engine, place.shard("a.jsonl", texts(*["same"] * 5)))
    assert len(engine.asked) == 1
    assert (manifest.counts.failed, manifest.counts.requests) == (5, 3)


def test_every_shard_has_all_its_answers_in_a_journal_of_its_own(place, tmp_path):
    shards = [place.shard(f"{name}.jsonl", texts("same", name)) for name in "ab"]
    place.run(ScriptedEngine(), *shards)
    # Take one shard's ledger away, with the index: the other has to do on its own.
    for name in place.files():
        if "_vlm/a.jsonl" in name or "_vlm/_index" in name or "manifest" in name:
            (place.destination_path / name).unlink()
    engine = ScriptedEngine()
    place.run_what_is_left(engine, place.source.stat("b.jsonl"))
    assert engine.asked == []


def test_answers_of_another_destination_count_when_it_is_named(place, tmp_path):
    yesterday = Place(tmp_path / "yesterday") if (tmp_path / "yesterday").mkdir() is None else None
    assert yesterday is not None
    yesterday.run(ScriptedEngine(), yesterday.shard("old.jsonl", texts("one", "two")))
    shard = place.shard("new.jsonl", texts("two", "three", "one"))
    engine = ScriptedEngine()
    (manifest,) = place.run(engine, shard, reuse=[yesterday.destination])
    assert engine.asked == ["three"]
    assert (manifest.counts.cached, manifest.counts.ok) == (2, 1)
    # What was taken over stands in the own journal: yesterday may go.
    (place.destination_path / "new.jsonl").unlink()
    again = ScriptedEngine()
    place.run_what_is_left(again, shard)
    assert again.asked == []


def test_a_destination_to_reuse_that_does_not_exist_is_empty(place, tmp_path):
    engine = ScriptedEngine()
    shard = place.shard("a.jsonl", texts("one"))
    place.run(engine, shard, reuse=[open_store(str(tmp_path / "never"))])
    assert engine.asked == ["one"]


def test_what_only_reads_answers_otherwise_asks_nothing_and_what_asks_otherwise_asks(place):
    shard = place.shard("a.jsonl", texts("one", "two"))
    place.run(ScriptedEngine(), shard)
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard, step=CaptionStep(suffix="!"))
    assert engine.asked == []
    assert [row["caption"] for row in place.output()] == ["about one!", "about two!"]
    place.run_what_is_left(engine, shard, step=CaptionStep("Other words.", suffix="!"))
    assert engine.asked == ["one", "two"]
    # And back: those answers are still there.
    place.run_what_is_left(engine, shard, step=CaptionStep())
    assert len(engine.asked) == 2
    assert [row["caption"] for row in place.output()] == ["about one", "about two"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (CaptionStep("New."), ["what is asked changed: the prompt (prompt)", "touches 2 samples"]),
        (CaptionStep(suffix="!"), ["only what is made of the answers changed: suffix", "without asking"]),
        (CaptionStep("New.", suffix="!"), ["what is asked changed: the prompt (prompt)."]),
    ],
)
def test_what_changed_since_the_commit_is_said_before_anything_is_asked(place, step, said):
    shard = place.shard("a.jsonl", [*texts("one", "two"), {"caption": "has one"}])
    place.run(ScriptedEngine(), shard)
    runner = place.runner(ScriptedEngine(), step=step)
    assert runner.all_committed([shard]) == [None]
    (sentence,) = runner.changes_since_commit()
    for words in ("last commit of 1 shard", *said):
        assert words in sentence
    unchanged = place.runner(ScriptedEngine())
    assert unchanged.all_committed([shard]) != [None]
    assert unchanged.changes_since_commit() == []


def test_one_changed_row_costs_one_request_and_fetches_nothing_else(place):
    rows = [{"images": [f"{i}.png"], "id": i} for i in range(100)]
    place.run(ScriptedEngine(), place.shard("a.jsonl", rows))
    rows[7] = {"images": ["other.png"], "id": 7}
    place.media.fetched.clear()
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, place.shard("a.jsonl", rows))
    assert engine.asked == [b"other.png"]
    assert place.media.fetched == ["other.png"]
    assert (manifest.counts.cached, manifest.counts.ok) == (99, 1)


def test_a_picture_replaced_behind_an_unchanged_shard_is_asked_about(place):
    shard = place.shard("a.jsonl", [{"images": [f"{i}.png"]} for i in range(20)])
    place.run(ScriptedEngine(), shard)
    assert place.runner(ScriptedEngine()).all_committed([shard]) != [None]
    place.media.content["7.png"] = b"another picture"
    engine = ScriptedEngine()
    assert place.run_what_is_left(engine, shard, trust_media=True) == []
    assert engine.asked == []
    (manifest,) = place.run_what_is_left(engine, shard)
    assert engine.asked == [b"another picture"]
    assert (manifest.counts.cached, manifest.counts.ok) == (19, 1)
    assert place.run_what_is_left(engine, shard) == []


def test_a_missing_picture_is_tried_again_when_it_is_there(place):
    shard = place.shard("a.jsonl", [{"images": ["missing.png"]}, {"images": ["corrupt.png"]}, {"text": "x"}])
    place.media.content["corrupt.png"] = b"corrupt"
    place.run(ScriptedEngine(), shard)
    place.media.fetched.clear()
    engine = ScriptedEngine()
    assert place.run_what_is_left(engine, shard) == []
    assert place.media.fetched == []
    place.media.content["missing.png"] = b"here it is"
    (manifest,) = place.run_what_is_left(engine, shard)
    assert engine.asked == [b"here it is"]
    # The corrupt one has not changed, so nobody looks at it again.
    assert place.media.fetched == ["missing.png"]
    assert (manifest.counts.failed, manifest.kinds) == (1, {"media_corrupt": 1})


def fails_for(*names: str, kind: str) -> Any:
    def answer(about: Any) -> str:
        if about in names:
            raise SampleError(kind, "no", attempts=1)
        return f"about {about}"

    return answer


def test_bad_luck_is_tried_again_by_every_run_and_only_that(place):
    shard = place.shard("a.jsonl", texts(*"abcdefghij"))
    place.run(ScriptedEngine(fails_for("c", kind="transient")), shard)
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, shard)
    assert engine.asked == ["c"]
    assert (manifest.counts.cached, manifest.counts.ok, manifest.counts.failed) == (9, 1, 0)
    assert place.errors() == []


def test_useless_answers_are_asked_for_again_only_when_too_many_failed(place):
    step = CaptionStep(useless="useless")
    shard = place.shard("a.jsonl", texts(*"abcdefghij"))
    place.run(ScriptedEngine(lambda about: "useless" if about == "c" else "fine"), shard, step=step)
    engine = ScriptedEngine()
    assert place.run_what_is_left(engine, shard, step=step, max_error_rate=0.1) == []
    assert engine.asked == []
    (manifest,) = place.run_what_is_left(engine, shard, step=step, max_error_rate=0.05)
    assert engine.asked == ["c"]
    assert (manifest.counts.cached, manifest.counts.ok, manifest.counts.failed) == (9, 1, 0)


def test_a_useless_answer_is_read_again_and_not_asked_for_when_only_the_reading_changed(place):
    shard = place.shard("a.jsonl", texts("a", "b"))
    place.run(ScriptedEngine(lambda about: "odd"), shard, step=CaptionStep(useless="odd"), max_error_rate=1.0)
    assert len(place.errors()) == 2
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=CaptionStep(suffix="!"))
    assert engine.asked == []
    assert (manifest.counts.cached, manifest.counts.failed) == (2, 0)
    assert [row["caption"] for row in place.output()] == ["odd!", "odd!"]


def test_a_redrive_asks_for_the_dead_letters_alone_and_merges_them(place):
    step = CaptionStep(useless="useless")
    rows = [*texts("a", "b", "c"), {"images": ["missing.png"]}]
    shard = place.shard("a.jsonl", rows)
    odd = ScriptedEngine(lambda about: "useless" if about in ("a", "b") else f"about {about}")
    place.run(odd, shard, step=step)
    first = {each["row"]: each for each in place.errors()}
    place.media.fetched.clear()
    engine = ScriptedEngine(lambda about: "useless" if about == "b" else "mended")
    (manifest,) = place.run_what_is_left(engine, shard, step=step, failed_only=True)
    assert engine.asked == ["a", "b"]
    assert place.media.fetched == [], "a picture that was missing and still is, is not looked for"
    assert [row.get("caption") for row in place.output()] == ["mended", None, "about c", None]
    assert (manifest.counts.ok, manifest.counts.cached, manifest.counts.failed) == (1, 1, 2)
    letters = {each["row"]: each for each in place.errors()}
    assert set(letters) == {1, 3}
    assert letters[1]["attempts"] == first[1]["attempts"] + 1
    assert letters[1]["first"] == first[1]["first"]
    # What the redrive got stands in the journal like any other answer.
    (place.destination_path / "a.jsonl").unlink()
    again = ScriptedEngine()
    place.run_what_is_left(again, shard, step=step)
    assert again.asked == []
    assert place.output()[0]["caption"] == "mended"


def test_a_redrive_of_one_kind_leaves_the_others_as_they_are(place):
    shard = place.shard("a.jsonl", texts("a", "b", "c"))
    place.run(ScriptedEngine(fails_for("a", kind="transient")), shard)

    engine = ScriptedEngine()
    assert place.run_what_is_left(engine, shard, failed_only=True, kinds=["refused"]) == []
    assert engine.asked == []
    (letter,) = place.errors()
    place.run_what_is_left(engine, shard, failed_only=True, kinds=["transient"])
    assert engine.asked == ["a"]
    assert place.errors() == []
    assert letter["kind"] == "transient"


def test_a_redrive_draws_another_answer_and_files_it_under_the_same_key(place):
    seeds: list[Any] = []

    class Drawing(CaptionStep):
        def process(self, sample: Any) -> Any:
            run = super().process(sample)
            (request,) = next(run)
            from dataclasses import replace

            answers = yield [replace(request, sampling={"temperature": 0.7, "seed": 5})]
            try:
                run.send(answers)
            except StopIteration as stop:
                return stop.value

    class Noting(ScriptedEngine):
        async def ask(self, request: Any) -> Any:
            seeds.append(request.sampling.get("seed"))
            return await super().ask(request)

    step, shard = Drawing(useless="useless"), place.shard("a.jsonl", texts("a"))
    place.run(Noting(lambda about: "useless"), shard, step=step)
    place.run_what_is_left(Noting(lambda about: "useless"), shard, step=step, failed_only=True)
    place.run_what_is_left(Noting(lambda about: "fine"), shard, step=step, failed_only=True)
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert place.output()[0]["caption"] == "fine"
    (place.destination_path / "a.jsonl").unlink()
    place.run_what_is_left(Noting(lambda about: "never asked"), shard, step=step)
    assert len(seeds) == 3
    assert place.output()[0]["caption"] == "fine"


def test_a_redrive_never_asks_for_what_is_no_dead_letter(place):
    shard = place.shard("a.jsonl", texts("a", "b"))
    place.run(ScriptedEngine(fails_for("a", kind="transient")), shard)
    for name in place.files():
        if "/journal/" in name:
            (place.destination_path / name).unlink()
    engine = ScriptedEngine()
    with pytest.raises(ShardError, match="not in the journal"):
        place.run_what_is_left(engine, shard, failed_only=True)
    assert set(engine.asked) <= {"a"}
    assert len(place.errors()) == 1


def test_a_redrive_with_other_parameters_or_of_nothing_says_what_to_do(place):
    shard = place.shard("a.jsonl", texts("a"))
    with pytest.raises(ConfigError, match="never committed"):
        place.run_what_is_left(ScriptedEngine(), shard, failed_only=True)
    place.run(ScriptedEngine(fails_for("a", kind="transient")), shard)
    with pytest.raises(ConfigError, match=r"prompt differ"):
        place.run_what_is_left(ScriptedEngine(), shard, step=CaptionStep("New."), failed_only=True)


def test_answers_that_cannot_be_saved_are_not_paid_for(place, monkeypatch):
    plain = place.destination.create

    def full_disk(name: str) -> Any:
        if "/journal/" in name:
            raise OSError(28, "No space left on device")
        return plain(name)

    monkeypatch.setattr(place.destination, "create", full_disk)
    engine = ScriptedEngine(delay=lambda about: 0.01, concurrency=4)
    shard = place.shard("a.jsonl", texts(*(str(i) for i in range(2000))))
    with pytest.raises(OSError, match="No space left"):
        place.run(engine, shard, flush=FlushPolicy(answers=20, seconds=60))
    assert len(engine.asked) <= 20 + 4
    assert place.committed_files() == set()


def test_a_run_that_fails_saves_what_it_paid_for(place):
    def answer(about: Any) -> str:
        if about == "60":
            raise ConfigError("the key was withdrawn")
        return "fine"

    engine = ScriptedEngine(answer, delay=lambda about: 0.01, concurrency=4)
    shard = place.shard("a.jsonl", texts(*(str(i) for i in range(100))))
    with pytest.raises(ConfigError):
        place.run(engine, shard, flush=FlushPolicy(answers=10_000, seconds=3600))
    again = ScriptedEngine()
    place.run(again, shard)
    assert "60" in again.asked
    assert len(again.asked) <= 100 - 60 + 4


def test_a_torn_segment_is_said_and_what_it_held_is_asked_again(place, caplog):
    shard = place.shard("a.jsonl", texts("a", "b"))
    place.run(ScriptedEngine(), shard)
    (place.destination_path / "a.jsonl").unlink()
    for name in place.files():
        if "/journal/" in name:
            path = place.destination_path / name
            path.write_bytes(path.read_bytes()[:-20])
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard)
    assert engine.asked == ["a", "b"]
    assert any("journal/" in record.getMessage() for record in caplog.records)


def test_a_manifest_names_the_journal_the_media_and_the_parameters(place):
    shard = place.shard("a.jsonl", [{"images": ["x"]}, {"images": ["missing"]}])
    (manifest,) = place.run(ScriptedEngine(), shard)
    folder = place.destination_path / "_vlm/a.jsonl/caption"
    assert len(manifest.journal) == 1
    assert all((folder / name).exists() for name in (*manifest.journal, manifest.media))
    assert manifest.kinds == {"media_missing": 1}
    assert manifest.parameters["step"] == {"name": "caption", "prompt": "Describe.", "suffix": ""}
    assert [path.name for path in (folder / "journal").iterdir()] == [
        name.rpartition("/")[2] for name in manifest.journal
    ]
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored["journal"] == list(manifest.journal)


def test_the_newest_answer_counts_whatever_the_order_in_which_they_are_read(place):
    shard = place.shard("a.jsonl", texts("a"))

    def fail_once(about: Any) -> str:
        return "useless"

    step = CaptionStep(useless="useless")
    place.run(ScriptedEngine(fail_once), shard, step=step)
    place.run_what_is_left(ScriptedEngine(lambda about: "good"), shard, step=step, failed_only=True)
    other = place.shard("b.jsonl", texts("a"))
    engine = ScriptedEngine()
    place.run(engine, other, step=step)
    assert engine.asked == []
    assert place.output("b.jsonl")[0]["caption"] == "good"


def test_two_runs_at_once_end_with_one_output_and_whole_journals(place):
    shard = place.shard("a.jsonl", texts(*(str(i) for i in range(200))))

    async def go() -> None:
        engines = [ScriptedEngine(delay=lambda about: 0.002) for _ in range(2)]
        async with engines[0], engines[1]:
            policy = FlushPolicy(answers=20, seconds=0.05)
            runs = [place.runner(engine, flush=policy).run_all([shard]) for engine in engines]
            await asyncio.gather(*runs)

    asyncio.run(go())
    assert [row["caption"] for row in place.output()] == [f"about {i}" for i in range(200)]
    (place.destination_path / "a.jsonl").unlink()
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard)
    assert engine.asked == []
