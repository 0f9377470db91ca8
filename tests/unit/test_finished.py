"""The index tells of many shards what a runner finds out of each one's manifest."""

from __future__ import annotations

import logging

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.finished import finished, standing_commits
from airflow_vlm_provider.ledger.media_memory import FILE_NAME
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place

NAMES = ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def shards(place):
    """Four shards that are done: three about texts, the last about pictures."""
    made = [place.shard(name, [{"text": f"{name} {row}"} for row in range(4)]) for name in NAMES[:3]]
    made.append(place.shard("d.jsonl", [{"images": ["one.png"]}, {"images": ["two.png", "one.png"]}]))
    place.run(ScriptedEngine(), *made)
    return made


def assert_done(place, shards, *, done, step=None, **options):
    """What the index tells is expected, and what the manifests tell, too."""
    runner = place.runner(ScriptedEngine(), step, **options)
    assert set(finished(runner, standing_commits(runner), shards)) == set(done)
    assert {shard.name for shard in shards if runner.committed(shard) is not None} == set(done)


def test_what_was_committed_is_done(place, shards):
    new = place.shard("new.jsonl", [{"text": "new"}])
    assert_done(place, [*shards, new], done=NAMES)
    assert_done(place, shards[1:3], done=NAMES[1:3])


def test_a_changed_shard_is_not_done(place, shards):
    changed = place.shard("b.jsonl", [{"text": "other"}])
    assert_done(place, [shards[0], changed, *shards[2:]], done=("a.jsonl", "c.jsonl", "d.jsonl"))


def test_a_shard_is_not_done_whose_output_is_gone_or_another(place, shards):
    (place.destination_path / "a.jsonl").unlink()
    (place.destination_path / "c.jsonl").write_text("another")
    assert_done(place, shards, done=("b.jsonl", "d.jsonl"))


def test_nothing_is_done_under_other_parameters(place, shards):
    assert_done(place, shards, done=(), step=CaptionStep(suffix="!"))


def test_what_is_to_be_overwritten_is_not_done(place, shards):
    assert_done(place, shards, done=(), overwrite=True)


def test_the_last_commit_counts(place, shards):
    place.run(ScriptedEngine(), shards[0], step=CaptionStep(suffix="!"))
    assert_done(place, shards, done=NAMES[1:])
    assert_done(place, shards, done=NAMES[:1], step=CaptionStep(suffix="!"))


def failing(*kinds: str) -> ScriptedEngine:
    left = list(kinds)

    def answer(about):
        if left:
            raise SampleError(left.pop(), "no answer", attempts=1)
        return "fine"

    return ScriptedEngine(answer)


@pytest.mark.parametrize(
    ("kinds", "rate", "done"),
    [
        (("refused",), 0.25, True),
        (("refused",), 0.1, False),
        (("refused", "media_corrupt"), 0.5, True),
        (("transient",), 1.0, False),
        (("refused", "transient"), 1.0, False),
    ],
)
def test_dead_letters_keep_a_shard_in_the_plan_if_they_may_end_otherwise(place, kinds, rate, done):
    shard = place.shard("a.jsonl", [{"text": f"{row}"} for row in range(4)])
    place.run(failing(*kinds), shard)
    assert_done(place, [shard], done=["a.jsonl"] if done else [], max_error_rate=rate)


def test_a_replaced_picture_keeps_its_shards_in_the_plan_unless_media_are_trusted(place, shards, caplog):
    place.media.content["one.png"] = b"replaced"
    with caplog.at_level(logging.INFO, logger="airflow_vlm_provider.finished"):
        assert_done(place, shards, done=NAMES[:3])
    assert "Media of 1 shards were replaced" in caplog.text
    assert_done(place, shards, done=NAMES, trust_media=True)


def test_without_its_record_of_media_a_shard_is_not_done(place, shards):
    (place.destination_path / "_vlm" / "d.jsonl" / "caption" / FILE_NAME).unlink()
    assert_done(place, shards, done=NAMES[:3])


def test_only_shards_with_dead_letters_are_left_to_a_redrive(place, shards):
    failed = place.shard("e.jsonl", [{"text": "e"}, {"text": "f"}])
    place.run(failing("refused"), failed)
    assert_done(place, [*shards, failed], done=NAMES, failed_only=True)
    assert_done(place, [*shards, failed], done=NAMES, failed_only=True, kinds=["refused"])
    assert_done(place, [*shards, failed], done=[*NAMES, "e.jsonl"], failed_only=True, kinds=["transient"])


def test_what_a_redrive_knows_nothing_of_is_left_to_its_task(place, shards):
    new = place.shard("new.jsonl", [{"text": "new"}])
    runner = place.runner(ScriptedEngine(), failed_only=True)
    assert set(finished(runner, standing_commits(runner), [*shards, new])) == set(NAMES)
