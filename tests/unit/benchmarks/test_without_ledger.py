from __future__ import annotations

from benchmarks.without_ledger import without_ledger
from tests.support.fakes import ScriptedEngine
from tests.support.place import Place


def test_a_run_without_the_ledger_answers_every_row_and_leaves_nothing_else(tmp_path):
    place = Place(tmp_path)
    place.media.content = {"x": b"x", "y": b"y"}
    engine = ScriptedEngine()
    with without_ledger():
        (manifest,) = place.run(engine, place.shard("a.jsonl", [{"images": [ref]} for ref in "xyx"]))
    assert engine.asked == [b"x", b"y", b"x"]
    assert manifest.counts.ok == 3
    assert place.files() == {"a.jsonl"}


def test_the_ledger_is_back_afterwards(tmp_path):
    place = Place(tmp_path)
    with without_ledger():
        pass
    place.run(ScriptedEngine(), place.shard("a.jsonl", [{"text": "one"}]))
    assert "_vlm/a.jsonl/caption/manifest.json" in place.files()
