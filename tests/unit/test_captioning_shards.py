"""Captioning whole shards: how many rows come of each, in every format, and what a rerun asks."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.ledger.segments import read_segment
from airflow_vlm_provider.steps.candidates import distances
from airflow_vlm_provider.steps.image_captioning import ImageCaptioningStep
from airflow_vlm_provider.steps.image_captioning_gpt4v import ImageCaptioningFromGPT4VStep
from airflow_vlm_provider.types import Choice
from tests.support.captioning import EOC, IMAGE, LOOP, REFUSAL, CandidateEngine
from tests.support.parquet_shards import parquet
from tests.support.place import Place
from tests.support.tars import contents, read, tar

M = 3
# What N samples become: the captions of each by their candidates' numbers, after the original where it is kept.
COUNTS = [
    ("random_any", True, 2),
    ("random_any", False, 1),
    ("similar_one_simhash", True, 2),
    ("similar_one_simhash", False, 1),
    ("all", True, 1 + M),
    ("all", False, M),
]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def step(**given: Any) -> ImageCaptioningStep:
    return ImageCaptioningStep(**{"caption_num": M, **given})


def rows(number: int) -> list[dict[str, Any]]:
    return [{"id": i, "text": f"{IMAGE} old {i} {EOC}", "images": [f"p{i}"]} for i in range(number)]


def expected(row: dict[str, Any], new: list[str], *, mode: str, keep: bool) -> None:
    """Check the texts that came of a row."""
    if keep:
        assert new.pop(0) == row["text"]
    said = [f"{IMAGE} {row['images'][0]} {number} {EOC}" for number in range(M)]
    assert new == said if mode == "all" else (len(new) == 1 and new[0] in said)


def journal(place: Place) -> list[dict[str, Any]]:
    folder = place.destination_path / "_vlm" / "a.jsonl" / "image_captioning" / "journal"
    return [json.loads(line) for path in folder.iterdir() for line in read_segment(path.read_bytes())]


def letters(place: Place, step: str = "image_captioning") -> list[dict[str, Any]]:
    path = place.destination_path / "_vlm" / "a.jsonl" / step / "errors.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("mode", "keep", "each"), COUNTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("output", ["full", "sidecar"])
def test_rows_of_lines_and_tables(place, name, output, mode, keep, each):
    given = rows(5)
    if name == "a.parquet":
        columns = {field: [row[field] for row in given] for field in given[0]}
        (place.source_path / name).write_bytes(parquet(columns))
        shard = place.source.stat(name)
    else:
        shard = place.shard(name, given)
    engine = CandidateEngine()
    (manifest,) = place.run(
        engine, shard, step=step(keep_candidate_mode=mode, keep_original_sample=keep), output=output
    )
    counts = manifest.counts
    assert (counts.rows_in, counts.rows_out, counts.ok, counts.requests) == (5, 5 * each, 5, 5)
    if name == "a.jsonl" and output == "full":
        made = place.output()
    else:
        made = pq.read_table(io.BytesIO((place.destination_path / "a.parquet").read_bytes())).to_pylist()
    assert len(made) == 5 * each
    for i, row in enumerate(given):
        group = made[i * each : (i + 1) * each]
        if output == "sidecar":
            assert [line["row"] for line in group] == [i] * each
        else:
            assert all({**line, "text": ""} == {**row, "text": ""} for line in group)
        expected(row, [line["text"] for line in group], mode=mode, keep=keep)


@pytest.mark.parametrize(("mode", "keep", "each"), COUNTS)
@pytest.mark.parametrize("text", ["txt", "json", "none"])
def test_rows_of_webdatasets_have_keys_of_their_own(place, text, mode, keep, each):
    members = []
    for i in range(4):
        # One whose key is what a second row of the sample before it would be called.
        key = "0000_1" if i == 1 else f"000{i}"
        members.append((f"{key}.jpg", f"p{i}".encode()))
        if text == "txt":
            members.append((f"{key}.txt", f"old {i}".encode()))
        if text == "json":
            members.append((f"{key}.json", json.dumps({"text": f"old {i}", "n": i}).encode()))
    (place.source_path / "a.tar").write_bytes(tar(*members))
    captioning = step(keep_candidate_mode=mode, keep_original_sample=keep, missing_placeholders="prepend")
    (manifest,) = place.run(CandidateEngine(), place.source.stat("a.tar"), step=captioning, output="full")
    assert (manifest.counts.rows_in, manifest.counts.rows_out, manifest.counts.requests) == (4, 4 * each, 4)
    written = (place.destination_path / "a.tar").read_bytes()
    samples = read(written)
    keys = [sample.key for sample in samples]
    assert len(samples) == len(set(keys)) == 4 * each
    names = [name for name, _ in contents(written)]
    assert len(set(names)) == len(names)
    theirs = webdataset.WebDataset(str(place.destination_path / "a.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == keys
    for i in range(4):
        group = samples[i * each : (i + 1) * each]
        assert [sample.embedded[sample.row["images"][0]] for sample in group] == [f"p{i}".encode()] * each
        made = [sample.row.get("text") for sample in group]
        if keep:
            assert made.pop(0) == (None if text == "none" else f"old {i}")
        said = [f"{IMAGE} p{i} {number} {EOC}" for number in range(M)]
        assert made == said if mode == "all" else made[0] in said
        if text == "json":
            assert [sample.row["n"] for sample in group] == [i] * each


@pytest.mark.parametrize(("mode", "keep", "each"), COUNTS)
def test_rows_of_a_webdatasets_sidecar(place, mode, keep, each):
    (place.source_path / "a.tar").write_bytes(tar(*[(f"{i}.jpg", f"p{i}".encode()) for i in range(4)]))
    captioning = step(keep_candidate_mode=mode, keep_original_sample=keep)
    place.run(CandidateEngine(), place.source.stat("a.tar"), step=captioning)
    lines = pq.read_table(io.BytesIO((place.destination_path / "a.parquet").read_bytes())).to_pylist()
    assert [(line["key"], line["row"]) for line in lines] == [
        (str(i), i) for i in range(4) for _ in range(each)
    ]
    for i in range(4):
        made = [line["text"] for line in lines if line["row"] == i]
        if keep:
            assert made.pop(0) is None
        said = [f"{IMAGE} p{i} {number} {EOC}" for number in range(M)]
        assert made == said if mode == "all" else made[0] in said


def test_samples_without_images_are_written_back_whatever_becomes_of_the_originals(place):
    odd = '{"text":"no image",  "n": 1.0e0}'
    shard = place.shard("a.jsonl", [odd, *rows(1)])
    (manifest,) = place.run(CandidateEngine(), shard, step=step(keep_original_sample=False))
    lines = (place.destination_path / "a.jsonl").read_text().splitlines()
    assert (lines[0], len(lines)) == (odd, 2)
    assert (manifest.counts.skipped, manifest.counts.ok) == (1, 1)


def test_a_rerun_asks_nothing_and_draws_the_same_captions(place):
    shard = place.shard("a.jsonl", rows(40))
    place.run(CandidateEngine(), shard, step=step())
    first = place.output()
    drawn = {row["text"].split()[2] for row in first[1::2]}
    assert drawn == {str(number) for number in range(M)}, "all samples got the same candidate"
    for name in ("a.jsonl", "_vlm/a.jsonl/image_captioning/manifest.json"):
        (place.destination_path / name).unlink()
    engine = CandidateEngine(lambda about, number: "something else")
    (manifest,) = place.run_what_is_left(engine, shard, step=step())
    assert engine.asked == []
    assert place.output() == first
    assert (manifest.counts.cached, manifest.counts.requests) == (40, 0)


def test_another_way_to_keep_candidates_asks_nothing(place):
    shard = place.shard("a.jsonl", rows(6))
    place.run(CandidateEngine(), shard, step=step())
    engine = CandidateEngine(lambda about, number: "something else")
    for mode, each in (("all", 4), ("similar_one_simhash", 2)):
        runner = place.runner(engine, step=step(keep_candidate_mode=mode))
        assert runner.committed(shard) is None
        (sentence,) = runner.changes_since_commit()
        assert "only what is made of the answers changed: keep_candidate_mode" in sentence
        (manifest,) = place.run_what_is_left(engine, shard, step=step(keep_candidate_mode=mode))
        assert (engine.asked, manifest.counts.rows_out) == ([], 6 * each)


def test_all_candidates_and_their_distances_are_in_the_journal(place):
    def says(about: bytes, number: int) -> str:
        return ["old 1", "young 2", REFUSAL][number]

    place.run(CandidateEngine(says), place.shard("a.jsonl", rows(2)), step=step())
    said = ["old 1", "young 2", REFUSAL]
    noted = {}
    for line in journal(place):
        assert [choice["text"] for choice in line["choices"]] == said
        noted[tuple(line["note"]["distances"])] = True
    assert noted.keys() == {tuple(distances(f"old {i}", said)) for i in range(2)}
    assert any(0 in each for each in noted)


def test_one_medium_is_one_request_wherever_it_stands(place):
    given = [
        {"text": f"{IMAGE} x {EOC}{IMAGE} y", "images": ["same", "same"]},
        {"text": f"{IMAGE} z", "images": ["same"]},
    ]
    engine = CandidateEngine()
    (manifest,) = place.run(engine, place.shard("a.jsonl", given), step=step(keep_candidate_mode="all"))
    assert (engine.asked, manifest.counts.requests) == ([b"same"], 1)
    assert place.output()[1]["text"] == f"{IMAGE} same 0 {EOC}{IMAGE} same 0 {EOC}"


def test_every_kind_of_failure_is_a_dead_letter_of_its_own_and_stops_nobody(place):
    said: dict[bytes, Any] = {
        b"refused": REFUSAL,
        b"declined": Choice("no", "refusal"),
        b"empty": " ",
        b"cut": Choice("A cat on a", "length"),
        b"loop": LOOP,
    }

    def says(about: bytes, number: int) -> str | Choice:
        if about == b"busy":
            raise TransientError("429", attempts=5)
        if about == b"rejected":
            raise SampleError("rejected", "too many tokens", attempts=1)
        return said.get(about, "a cat")

    names = ["refused", "declined", "empty", "cut", "loop", "busy", "rejected", "missing", "corrupt"]
    given: list[Any] = [{"text": "", "images": [name, "fine"]} for name in names]
    given += [
        {"text": f"{IMAGE} x {IMAGE}", "images": ["fine"]},
        {"text": "words", "images": ["fine"]},
        {"text": "", "images": [3]},
        "{broken",
        {"text": "", "images": ["fine"]},
    ]
    shard = place.shard("a.jsonl", given)
    (manifest,) = place.run(CandidateEngine(says), shard, step=ImageCaptioningStep())
    found = [(letter["row"], letter["kind"], letter["media"]) for letter in letters(place)]
    kinds = ["refused", "refused", "empty_answer", "cut_short", "repetitive", "transient", "rejected"]
    kinds += ["media_missing", "media_corrupt"]
    assert found == [
        *zip(range(9), kinds, names, strict=True),
        *((number, "malformed_row", None) for number in range(9, 13)),
    ]
    assert (manifest.counts.failed, manifest.counts.ok) == (13, 1)
    counts = [letter["message"] for letter in letters(place)][9:11]
    assert "2 placeholders" in counts[0]
    assert "1 image," in counts[0]
    assert "0 placeholders" in counts[1]
    assert len(place.output()) == 13 - 1 + 2, "the line that is no JSON is left out, as it can't be a row"


def test_a_dead_letter_that_is_asked_again_costs_one_request(place):
    shard = place.shard("a.jsonl", [{"text": "", "images": ["a", "b"]}])
    place.run(
        CandidateEngine(lambda about, number: "" if about == b"b" else "x"), shard, step=ImageCaptioningStep()
    )
    assert [letter["kind"] for letter in letters(place)] == ["empty_answer"]
    engine = CandidateEngine()
    (manifest,) = place.run(engine, shard, step=ImageCaptioningStep(), failed_only=True)
    assert engine.asked == [b"b"]
    assert engine.requests[0].sampling["seed"] > 2, "another draw than those that came to nothing"
    assert (manifest.counts.ok, manifest.counts.failed) == (1, 0)
    assert place.output()[1]["text"] == f"{IMAGE} x {IMAGE} b 0 {EOC}"


def test_with_any_a_useless_answer_costs_nobody_elses(place):
    def says(about: bytes, number: int) -> str:
        if about == b"bad":
            raise SampleError("rejected", "no", attempts=1)
        return REFUSAL if about == b"secret" else f"of {about.decode()}"

    given = [
        {"text": "", "images": ["a", "bad", "missing", "secret", "b"]},
        {"text": "", "images": ["missing", "bad"]},
    ]
    shard, captioning = place.shard("a.jsonl", given), ImageCaptioningFromGPT4VStep()
    (manifest,) = place.run(CandidateEngine(says), shard, step=captioning)
    assert place.output()[1]["text"] == f"{IMAGE} of a {IMAGE}{IMAGE}{IMAGE}{IMAGE} of b {EOC}"
    assert [(each["row"], each["kind"]) for each in letters(place, captioning.name)] == [(1, "media_missing")]
    assert (manifest.counts.ok, manifest.counts.failed) == (1, 1)
    place.run(CandidateEngine(says), shard, step=ImageCaptioningFromGPT4VStep(any_or_all="all"))
    found = [(each["row"], each["kind"], each["media"]) for each in letters(place, captioning.name)]
    assert found[0][:2] == (0, "rejected")
    assert len(found) == 2


def test_with_any_a_dead_letter_is_asked_again_about_all_its_images(place):
    shard, captioning = (
        place.shard("a.jsonl", [{"text": "", "images": ["a", "b"]}]),
        ImageCaptioningFromGPT4VStep(),
    )
    place.run(CandidateEngine(lambda about, number: REFUSAL), shard, step=captioning)
    assert [each["media"] for each in letters(place, captioning.name)] == ["a"]
    engine = CandidateEngine()
    place.run(engine, shard, step=captioning, failed_only=True)
    assert engine.asked == [b"a", b"b"]
    assert place.output()[1]["text"] == f"{IMAGE} a 0 {IMAGE} b 0 {EOC}"


def test_a_picture_that_appears_later_is_captioned_then(place):
    shard = place.shard("a.jsonl", [{"text": "", "images": ["a", "missing"]}])
    captioning = ImageCaptioningFromGPT4VStep(keep_original_sample=False)
    place.run(CandidateEngine(), shard, step=captioning)
    assert place.output()[0]["text"] == f"{IMAGE} a 0 {IMAGE}{EOC}"
    assert place.run_what_is_left(CandidateEngine(), shard, step=captioning) == []
    place.media.content["missing"] = b"found"
    engine = CandidateEngine()
    place.run_what_is_left(engine, shard, step=captioning)
    assert engine.asked == [b"found"]
    assert place.output()[0]["text"] == f"{IMAGE} a 0 {IMAGE} found 0 {EOC}"
