"""Odd answers, odd requests and odd rows: all is counted, nothing is asked twice."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.types import Answer, Choice, MediaRef, Request, Result, Usage
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place
from tests.support.text_rows import texts


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


class Odd(ScriptedEngine):
    """Gives one and the same answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.given = answer

    async def ask(self, request: Request) -> Answer:
        await super().ask(request)
        return self.given


@pytest.mark.parametrize(
    "choices",
    [
        (Choice("\ud800 half a character"),),
        (Choice("x" * 300_000),),
        (Choice("line\nbreak\u2028\x00", "length"), Choice("", "refusal"), Choice("", "other")),
    ],
)
def test_odd_answers_are_kept_as_they_are(place, choices):
    shard = place.shard("a.jsonl", texts(*"abcdefgh"))
    given = Answer(choices, "m", Usage(requests=1))
    place.run(Odd(given), shard, flush=FlushPolicy(answers=3, bytes=1000))
    first = place.output()
    assert first[0]["caption"] == choices[0].text
    (place.destination_path / "a.jsonl").unlink()
    engine = ScriptedEngine()
    place.run_what_is_left(engine, shard)
    assert engine.asked == []
    assert place.output() == first


def test_an_answer_without_choices_that_a_step_breaks_at_costs_one_row(place):
    (manifest,) = place.run(Odd(Answer((), "m", Usage(requests=1))), place.shard("a.jsonl", texts("a", "b")))
    assert manifest.kinds == {"internal": 2}
    assert manifest.counts.requests == 2


class Twice(CaptionStep):
    """Asks the same at once, and then once more."""

    def process(self, sample: Any) -> Any:
        request = Request(system=None, parts=(sample.row["text"],), n=2)
        one, two = yield [request, request]
        (three,) = yield [request]
        assert one == two == three
        return Result(rows=({**sample.row, "caption": one.choices[0].text},))


def test_who_asks_the_same_twice_pays_once(place):
    shard = place.shard("a.jsonl", texts("a"))
    engine = ScriptedEngine(delay=lambda about: 0.01)
    (manifest,) = place.run(engine, shard, step=Twice())
    assert engine.asked == ["a"]
    assert (manifest.counts.requests, manifest.counts.prompt_tokens, manifest.counts.ok) == (1, 10, 1)


def test_a_step_that_asks_for_nothing_goes_on(place):
    class Empty(CaptionStep):
        def process(self, sample: Any) -> Any:
            answers = yield []
            return Result(rows=({**sample.row, "caption": str(len(answers))},))

    engine = ScriptedEngine()
    (manifest,) = place.run(engine, place.shard("a.jsonl", texts("a")), step=Empty())
    assert place.output() == [{"text": "a", "caption": "0"}]
    assert (manifest.counts.ok, manifest.counts.cached, engine.asked) == (1, 0, [])


def test_reusing_a_destination_for_itself_changes_nothing(place):
    shard = place.shard("a.jsonl", texts("a"))
    place.run(ScriptedEngine(), shard, reuse=[place.destination])
    engine = ScriptedEngine()
    place.run(engine, place.shard("b.jsonl", texts("a", "b")), reuse=[place.destination, place.destination])
    assert engine.asked == ["b"]


def test_counts_add_up_whatever_rows_end_like(place):
    def answer(about: Any) -> str:
        kind = about.split(" ")[0]
        if kind in ("refused", "rejected", "transient"):
            raise SampleError(kind, "no", attempts=2)
        return "useless" if kind == "useless" else "fine"

    kinds = ("fine", "useless", "refused", "rejected", "transient", "fine")
    rows: list[Any] = [{"text": f"{kinds[i % 6]} {i // 12}"} for i in range(120)]
    rows += [{"caption": "there"}, "no row", {"images": ["missing"]}, {"text": "x", "break": "step"}]
    (manifest,) = place.run(
        ScriptedEngine(answer), place.shard("a.jsonl", rows), step=CaptionStep(useless="useless")
    )
    counts = manifest.counts
    assert counts.rows_in == len(rows) == counts.ok + counts.cached + counts.skipped + counts.failed
    assert counts.rows_out == len(rows) - 1
    assert counts.failed == sum(manifest.kinds.values()) == len(place.errors())
    assert manifest.kinds == {
        "unparsable": 20,
        "refused": 20,
        "rejected": 20,
        "transient": 20,
        "malformed_row": 1,
        "media_missing": 1,
        "internal": 1,
    }


def test_a_dead_letter_keeps_its_history_when_its_row_was_moved(place):
    engine = ScriptedEngine(lambda about: "useless" if about == "bad" else "fine")
    step = CaptionStep(useless="useless")
    place.run_what_is_left(engine, place.shard("a.jsonl", texts("bad")), step=step)
    (before,) = place.errors()
    shard = place.shard("a.jsonl", texts("another", "bad"))
    place.run_what_is_left(engine, shard, step=step)
    (after,) = place.errors()
    assert (before["row"], after["row"]) == (0, 1)
    assert after["attempts"] == before["attempts"] == 1, "its answer was known, so it was not asked again"
    place.run_what_is_left(engine, shard, step=step, failed_only=True)
    assert place.errors()[0]["attempts"] == 2


def test_a_row_that_repeats_a_dead_letter_is_none_itself(place):
    step = CaptionStep(useless="useless")
    drawn: list[str] = []

    def answer(about: Any) -> str:
        drawn.append(about)
        if about == "same" and drawn.count("same") == 1:
            raise SampleError("rejected", "no", attempts=1)
        return "fine"

    # In turn, so that the second of the two is not answered with the first.
    engine = ScriptedEngine(answer)
    rows = [{"text": "same"}, *texts(*map(str, range(60))), {"text": "same"}]
    shard = place.shard("a.jsonl", rows)
    place.run_what_is_left(engine, shard, step=step)
    assert [letter["row"] for letter in place.errors()] == [0]
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=step, failed_only=True)
    assert engine.asked == ["same"]
    assert (manifest.counts.ok, manifest.counts.cached, manifest.counts.failed) == (1, 61, 0)


def test_a_shard_without_media_has_no_record_of_them_to_miss(place, caplog):
    shard = place.shard("a.jsonl", texts("a"))
    place.run(ScriptedEngine(), shard)
    place.run_what_is_left(ScriptedEngine(), shard, step=CaptionStep(suffix="!"))
    assert "is of no use" not in caplog.text


def test_trusted_media_are_neither_listed_nor_fetched(place, monkeypatch):
    shard = place.shard("a.jsonl", [{"images": ["x"]}])
    place.run(ScriptedEngine(), shard)
    place.media.fetched.clear()
    monkeypatch.setattr(place.media, "identities", lambda uris: pytest.fail("listed"))
    place.run_what_is_left(ScriptedEngine(), shard, step=CaptionStep(suffix="!"), trust_media=True)
    assert place.media.fetched == []
    assert place.output()[0]["caption"] == "about b'x'!"


def test_what_is_wrong_with_a_row_stands_in_its_dead_letter_and_a_defect_in_the_log(place, caplog):
    place.run(ScriptedEngine(), place.shard("a.jsonl", ["{", {"text": "x", "break": "step"}]))
    assert "JSON" in place.errors()[0]["message"]
    assert "Row 1 of a.jsonl broke the step caption" in caplog.text
    assert "a defect of the step" in caplog.text


def test_the_progress_counts_rows_as_the_manifest_does(place):
    class Odd(CaptionStep):
        def process(self, sample: Any) -> Any:
            yield []
            return Result(rows=({"caption": {1, 2}},))

    odd = place.runner(ScriptedEngine(), Odd())

    async def go() -> list[Any]:
        return await odd.run_all([place.shard("a.jsonl", texts("a"))])

    (manifest,) = asyncio.run(go())
    assert manifest.kinds == {"unwritable": 1}
    assert odd.progress.snapshot()["failed"] == 1


@pytest.mark.parametrize("images", [["known", "rejected"], ["fresh", "missing"], ["missing", "fresh"]])
def test_a_row_that_makes_do_with_what_it_got_is_no_cached_one(place, images):
    class Content(CaptionStep):
        def process(self, sample: Any) -> Any:
            with suppress(SampleError):
                yield [
                    Request(system=None, parts=(MediaRef("image", ref), "?")) for ref in sample.row["images"]
                ]
            return Result(rows=({**sample.row, "caption": "made do"},))

    def answer(about: Any) -> str:
        if about == b"rejected":
            raise SampleError("rejected", "no", attempts=1)
        return "fine"

    place.run(ScriptedEngine(answer), place.shard("a.jsonl", [{"images": ["known"]}]), step=Content())
    shard = place.shard("b.jsonl", [{"images": images}])
    (manifest,) = place.run(ScriptedEngine(answer), shard, step=Content())
    assert (manifest.counts.ok, manifest.counts.cached, manifest.counts.requests) == (1, 0, 1)
    shard = place.shard("c.jsonl", [{"images": ["known", "missing"]}])
    (manifest,) = place.run(ScriptedEngine(answer), shard, step=Content())
    assert (manifest.counts.ok, manifest.counts.cached, manifest.counts.requests) == (0, 1, 0)


@pytest.mark.parametrize(
    ("seed", "asked"), [(5, [5, 1005, 2005]), (None, [None, 1000, 2000]), (..., [..., 1000, 2000])]
)
def test_asking_anew_counts_up_from_the_steps_own_seed(place, seed, asked):
    seeds: list[Any] = []

    class Noting(ScriptedEngine):
        async def ask(self, request: Request) -> Answer:
            seeds.append(request.sampling.get("seed", ...))
            return await super().ask(request)

    class Seeded(CaptionStep):
        def process(self, sample: Any) -> Any:
            sampling = {"temperature": 1} | ({} if seed is ... else {"seed": seed})
            yield [Request(system=None, parts=(sample.row["text"],), sampling=sampling)]
            raise SampleError("unparsable", "useless", attempts=1)

    shard = place.shard("a.jsonl", texts("a"))
    for failed_only in (False, True, True):
        place.run_what_is_left(Noting(), shard, step=Seeded(), failed_only=failed_only)
    assert seeds == asked


def test_of_a_row_with_several_pictures_only_the_one_at_fault_is_asked_about_anew(place):
    class Strict(CaptionStep):
        def process(self, sample: Any) -> Any:
            answers = yield [
                Request(system=None, parts=(MediaRef("image", ref),)) for ref in sample.row["images"]
            ]
            for ref, answer in zip(sample.row["images"], answers, strict=True):
                if answer.choices[0].text == "useless":
                    raise SampleError("unparsable", "useless", media=ref, attempts=1)
            return Result(rows=({**sample.row, "caption": answers[-1].choices[0].text},))

    shard = place.shard("a.jsonl", [{"images": ["x", "y", "z"]}])
    place.run(ScriptedEngine(lambda about: "useless" if about == b"y" else "fine"), shard, step=Strict())
    assert len(place.errors()[0]["keys"]) == 1
    engine = ScriptedEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=Strict(), failed_only=True)
    assert engine.asked == [b"y"]
    assert manifest.counts.ok == 1


def test_media_whose_answers_are_known_are_not_made_ready_to_be_sent(place, monkeypatch):
    shard = place.shard("a.jsonl", [{"images": ["x"]}])
    place.run(ScriptedEngine(), shard)
    (place.destination_path / "_vlm/a.jsonl/caption/media.jsonl.zst").unlink()
    prepared: list[Any] = []
    monkeypatch.setattr(place.media, "prepare", prepared.append)
    (manifest,) = place.run_what_is_left(ScriptedEngine(), shard)
    assert (manifest.counts.cached, prepared) == (1, [])


def test_what_fails_unasked_takes_nothing_from_what_was_paid_before(place):
    class InTurn(CaptionStep):
        def process(self, sample: Any) -> Any:
            for ref in sample.row["images"]:
                with suppress(SampleError):
                    yield [Request(system=None, parts=(MediaRef("image", ref),))]
            return Result(rows=({**sample.row, "caption": "made do"},))

    shard = place.shard("a.jsonl", [{"images": ["fresh", "missing"]}])
    (manifest,) = place.run(ScriptedEngine(), shard, step=InTurn())
    assert (manifest.counts.ok, manifest.counts.cached) == (1, 0)
