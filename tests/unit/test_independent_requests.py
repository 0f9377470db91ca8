"""Requests of one sample of which each may fail for itself: the step sees the errors, and all other answers."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError
from airflow_vlm_provider.types import Answer, Independent, MediaRef, Request, Result
from tests.support.fakes import CaptionStep, ScriptedEngine
from tests.support.place import Place


class EachAlone(CaptionStep):
    """Says of each picture what it is, or why it can't be said."""

    def process(self, sample: Any) -> Any:
        refs = sample.row["images"]
        answers = yield Independent(Request(None, (MediaRef("image", ref), "What?")) for ref in refs)
        said = [self.said(answer) for answer in answers]
        return Result(rows=({**sample.row, "caption": " ".join(said)},))

    def said(self, answer: Answer) -> str:
        if answer.error is None:
            return answer.choices[0].text
        assert answer.choices == ()
        return f"{answer.error.kind}:{answer.error.media}"


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def answer(about: bytes) -> str:
    if about == b"secret":
        raise SampleError("refused", "no", media="secret", attempts=1)
    return about.decode()


def test_the_answers_beside_an_error_are_not_lost_and_all_are_counted(place):
    images = ["a", "missing", "secret", "b", "corrupt"]
    (manifest,) = place.run(
        ScriptedEngine(answer), place.shard("a.jsonl", [{"images": images}]), step=EachAlone()
    )
    (row,) = place.output()
    assert row["caption"] == "a media_missing:missing refused:secret b media_corrupt:corrupt"
    counts = manifest.counts
    assert (counts.ok, counts.failed, counts.requests, counts.prompt_tokens) == (1, 0, 3, 20)


@pytest.mark.parametrize("count", [1, 2])
def test_one_that_fails_alone_is_told_like_one_of_many(place, count):
    rows = [{"images": ["missing"] * count}]
    place.run(ScriptedEngine(answer), place.shard("a.jsonl", rows), step=EachAlone())
    assert place.output()[0]["caption"] == " ".join(["media_missing:missing"] * count)


@pytest.mark.parametrize("error", [ConfigError("wrong key"), EngineError("gone")])
def test_what_is_no_samples_fault_stops_the_shard_all_the_same(place, error):
    def broken(about: Any) -> str:
        raise error

    with pytest.raises(type(error)):
        place.run(ScriptedEngine(broken), place.shard("a.jsonl", [{"images": ["a", "b"]}]), step=EachAlone())
    assert place.committed_files() == set()
