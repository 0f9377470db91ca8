from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.ledger.dead_letters import DeadLetters
from airflow_vlm_provider.ledger.history import histories, overview
from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.ledger.records import to_line
from airflow_vlm_provider.ledger.segments import SegmentWriter, segment_name
from airflow_vlm_provider.types import Answer, Choice, Outcome, Sample
from tests.support.memory_files import MemoryFiles

TIME = datetime(2026, 1, 1, tzinfo=timezone.utc)


def commit(files: MemoryFiles, shard: str, *, step: str = "s", **given: Any) -> Manifest:
    values: dict[str, Any] = {"counts": Counts(rows_in=1, ok=1), "journal": [], **given}
    manifest = Manifest(
        model="m",
        fingerprint="f",
        input={"uri": f"s3://b/in/{shard}"},
        output={"uri": f"s3://b/out/{shard}"},
        errors=None,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        provider_version="0",
        **values,
    )
    save_manifest(files, shard, step, manifest)
    return manifest


def segment(files: MemoryFiles, shard: str, number: int, *, answers: int, step: str = "s") -> str:
    name = segment_name(TIME, "0123abcd", number)
    writer = SegmentWriter({"shard": shard, "written_by": {"dag_id": "d"}})
    for index in range(answers):
        writer.add(to_line(f"{index:032x}", Answer((Choice("yes"),), "m"), time=TIME))
    writer.save(files, f"_vlm/{shard}/{step}/{name}")
    writer.close()
    return name


def dead(files: MemoryFiles, shard: str, *kinds: str, step: str = "s") -> None:
    letters = DeadLetters()
    for row, kind in enumerate(kinds):
        letters.add(Outcome(Sample(row, row + 1, {}, b"%d" % row), "failed", error=SampleError(kind, "no")))
    letters.save(files, shard, step)
    letters.close()


def test_a_shards_history_has_commits_segments_and_dead_letters_of_every_step():
    files = MemoryFiles()
    name = segment(files, "a.jsonl", 1, answers=3000)
    leftover = segment(files, "a.jsonl", 2, answers=1)
    manifest = commit(files, "a.jsonl", journal=[name])
    dead(files, "a.jsonl", "refused", "media_missing", "refused")
    segment(files, "a.jsonl", 1, answers=2, step="t")
    commit(files, "a.jsonl.more.jsonl")
    commit(files, "a.jsonl/t/b.jsonl")

    first, second = histories(files, "a.jsonl", letters=2)

    assert first.commit.manifest == manifest
    assert (first.commit.place, first.commit.problem, first.commit.segments) == (("a.jsonl", "s"), None, 2)
    assert [(each.name, each.answers, each.referred, each.problem) for each in first.segments] == [
        (name, 3000, True, None),
        (leftover, 1, False, None),
    ]
    assert first.segments[0].header["written_by"] == {"dag_id": "d"}
    assert first.segments[0].size == len(files.files[f"_vlm/a.jsonl/s/{name}"])
    assert first.kinds == {"refused": 2, "media_missing": 1}
    assert [each["row"] for each in first.letters] == [0, 1]
    assert (second.commit.place.step, second.commit.problem) == ("t", "never committed")
    assert histories(files, "b.jsonl", letters=2) == []


def test_what_can_not_be_read_is_said_and_stops_nothing():
    files = MemoryFiles()
    names = [segment(files, "a.jsonl", number, answers=1) for number in range(3)]
    commit(files, "a.jsonl", journal=names)
    torn, away = f"_vlm/a.jsonl/s/{names[0]}", f"_vlm/a.jsonl/s/{names[1]}"
    files.put(torn, files.files[torn][:-3])
    files.broken.add(away)
    files.put("_vlm/b.jsonl/s/manifest.json", b"{")
    commit(files, "c.jsonl")
    files.broken.add("_vlm/c.jsonl/s/manifest.json")

    (history,) = histories(files, "a.jsonl", letters=1)
    problems = {each.place.shard: each.problem for each in overview(files)}

    assert [each.answers for each in history.segments] == [None, None, 1]
    assert history.segments[0].problem.startswith("torn: ")
    assert "out of reach" in history.segments[1].problem
    assert problems["a.jsonl"] is None
    assert "damaged" in problems["b.jsonl"]
    assert "out of reach" in problems["c.jsonl"]


def test_the_overview_has_every_shard_and_step_in_order():
    files = MemoryFiles()
    for number in range(600):
        commit(files, f"{number:03}.jsonl", counts=Counts(rows_in=number, ok=number))
    name = segment(files, "sub/x.jsonl", 1, answers=1, step="t")
    files.put("_vlm/_index/s/commits/x", b"")
    files.put("_vlm/_plans/x.jsonl.zst", b"")

    commits = list(overview(files))

    assert [each.place.shard for each in commits] == [
        *(f"{number:03}.jsonl" for number in range(600)),
        "sub/x.jsonl",
    ]
    assert [each.manifest.counts.rows_in for each in commits[:-1]] == list(range(600))
    assert (commits[-1].manifest, commits[-1].segments) == (None, 1)
    assert commits[-1].journal_size == len(files.files[f"_vlm/sub/x.jsonl/t/{name}"])
