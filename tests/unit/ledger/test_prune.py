from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest

from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.ledger.plans import save_plan
from airflow_vlm_provider.ledger.prune import DAY_SECONDS, prune
from airflow_vlm_provider.ledger.segments import segment_name
from tests.support.memory_files import MemoryFile, MemoryFiles

NOW = time.time()
WRITER = "0123abcd"


def commit(files: MemoryFiles, shard: str, *segments: str, step: str = "s") -> None:
    manifest = Manifest(
        counts=Counts(),
        model="m",
        fingerprint="f",
        input={},
        output={},
        errors=None,
        started_at="",
        finished_at="",
        provider_version="",
        journal=list(segments),
    )
    save_manifest(files, shard, step, manifest)


def segment(files: MemoryFiles, shard: str, number: int, *, days: float, step: str = "s") -> str:
    """Put a segment of so many days there; returns its name below the shard's folder."""
    name = segment_name(datetime(2026, 1, 1, tzinfo=timezone.utc), WRITER, number)
    files.put(f"_vlm/{shard}/{step}/{name}", b"x" * 10, modified=NOW - days * DAY_SECONDS)
    return name


def names(files: MemoryFiles) -> set[str]:
    return set(files.files)


def test_what_no_manifest_refers_to_and_is_old_goes_and_nothing_else():
    files = MemoryFiles()
    kept = segment(files, "a.jsonl", 1, days=40)
    segment(files, "a.jsonl", 2, days=40)
    segment(files, "a.jsonl", 3, days=29)
    segment(files, "sub/never.jsonl", 1, days=31)
    commit(files, "a.jsonl", kept)
    for shard in ("journal/x.jsonl", "x/s/journal/y.jsonl.zst"):
        commit(files, shard, segment(files, shard, 1, days=99))
    unknown = (
        "_vlm/a.jsonl/s/journal/notes.txt",
        "_vlm/a.jsonl/s/journal/deeper/" + kept.rpartition("/")[2],
        "_vlm/a.jsonl/s/errors.jsonl",
        "_vlm/a.jsonl/s/media.jsonl.zst",
        "_vlm/_index/s/keys/1.keys",
        "a.jsonl",
        kept,
    )
    for name in unknown:
        files.put(name, b"x", modified=1.0)
    before = names(files)

    pruned = prune(files, older_than_days=30)

    went = {f"_vlm/a.jsonl/s/{segment_name(datetime(2026, 1, 1, tzinfo=timezone.utc), WRITER, 2)}"}
    went.add(f"_vlm/sub/never.jsonl/s/{kept}")
    assert before - names(files) == went
    assert names(files) <= before, "nothing is left behind"
    assert (pruned.segments, pruned.size, pruned.kept) == (2, 20, [])
    assert [(each.place.shard, len(each.segments)) for each in pruned.removed] == [
        ("a.jsonl", 1),
        ("sub/never.jsonl", 1),
    ]


def test_a_dry_run_says_the_same_and_writes_and_removes_nothing():
    files = MemoryFiles()
    segment(files, "a.jsonl", 1, days=40)
    plan = save_plan(files, [["a.jsonl"]])
    files.modified[plan] = NOW - 40 * DAY_SECONDS
    before = dict(files.files)

    dry = prune(files, older_than_days=30, dry_run=True)

    assert files.files == before
    assert files.deleted == []
    assert prune(files, older_than_days=30) == dry
    assert names(files) == set()


def test_old_plans_go_and_younger_ones_stay():
    files = MemoryFiles()
    old, young = save_plan(files, [["a.jsonl"]]), save_plan(files, [["b.jsonl"]])
    files.modified[old] = NOW - 31 * DAY_SECONDS
    size = len(files.files[old])

    pruned = prune(files, older_than_days=30)

    assert (pruned.plans, pruned.plans_size) == ([old], size)
    assert names(files) == {young}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"journal": null}', b'{"journal": [1]}', b"\xff"])
def test_a_shard_whose_manifest_is_damaged_is_left_as_it_is(content):
    files = MemoryFiles()
    name = segment(files, "a.jsonl", 1, days=40)
    files.put("_vlm/a.jsonl/s/manifest.json", content)
    segment(files, "b.jsonl", 1, days=40)

    pruned = prune(files, older_than_days=30)

    assert f"_vlm/a.jsonl/s/{name}" in files.files
    assert [each.place.shard for each in pruned.removed] == ["b.jsonl"]
    assert len(pruned.kept) == 1
    assert "a.jsonl (s) is left as it is" in pruned.kept[0]


def test_a_manifest_that_can_not_be_read_is_not_one_that_is_not_there():
    files = MemoryFiles()
    name = segment(files, "a.jsonl", 1, days=40)
    commit(files, "a.jsonl", name)
    files.broken.add("_vlm/a.jsonl/s/manifest.json")

    pruned = prune(files, older_than_days=30)

    assert f"_vlm/a.jsonl/s/{name}" in files.files
    assert "out of reach" in pruned.kept[0]


def test_a_run_that_commits_after_the_listing_keeps_its_segments():
    class Racing(MemoryFiles):
        def list(self, folder: str = "") -> Iterator[MemoryFile]:
            yield from super().list(folder)
            if folder == "_vlm":
                commit(self, "a.jsonl", name)

    files = Racing()
    name = segment(files, "a.jsonl", 1, days=40)

    assert prune(files, older_than_days=30).segments == 0
    assert f"_vlm/a.jsonl/s/{name}" in files.files


def test_ages_are_told_by_the_storages_clock(monkeypatch):
    files = MemoryFiles()
    segment(files, "a.jsonl", 1, days=2)
    storage = time.time
    monkeypatch.setattr(
        files, "put", lambda name, data: MemoryFiles.put(files, name, data, modified=storage())
    )
    monkeypatch.setattr("airflow_vlm_provider.ledger.prune.time.time", lambda: NOW + 365 * DAY_SECONDS)

    assert prune(files, older_than_days=30).segments == 0


def test_where_the_storage_tells_no_times_nothing_is_old():
    class Timeless(MemoryFiles):
        def list(self, folder: str = "") -> Iterator[MemoryFile]:
            for each in super().list(folder):
                yield MemoryFile(each.name, each.size, 0.0)

    files = Timeless()
    segment(files, "a.jsonl", 1, days=1000)
    save_plan(files, [["a.jsonl"]])

    for dry_run in (True, False):
        pruned = prune(files, older_than_days=30, dry_run=dry_run)
        assert (pruned.segments, pruned.plans) == (0, [])
    assert len(files.files) == 2


def test_the_key_index_forgets_what_went_and_nothing_else():
    files = MemoryFiles()
    kept, gone = segment(files, "a.jsonl", 1, days=40), segment(files, "a.jsonl", 2, days=40)
    commit(files, "a.jsonl", kept)
    index = KeyIndex(files, step="s")
    index.add(f"_vlm/a.jsonl/s/{kept}", ["0" * 32, "1" * 32])
    index.add(f"_vlm/a.jsonl/s/{gone}", ["1" * 32, "2" * 32])

    prune(files, older_than_days=30)

    read = KeyIndex(files, step="s")
    read.load()
    assert read.find("0" * 32) == read.find("1" * 32) == [f"_vlm/a.jsonl/s/{kept}"]
    assert read.find("2" * 32) == []


def test_a_shard_whose_manifest_names_what_is_not_there_is_left_as_it_is():
    files = MemoryFiles()
    # Two attempts at once: the second committed, put all answers into one segment and deleted the others; then the
    # first committed, and its manifest names one of those.
    whole = segment(files, "a.jsonl", 2, days=40)
    gone = segment_name(datetime(2026, 1, 1, tzinfo=timezone.utc), WRITER, 1)
    commit(files, "a.jsonl", gone)
    pruned = prune(files, older_than_days=30)
    assert pruned.segments == 0
    assert f"_vlm/a.jsonl/s/{whole}" in names(files)
    (reason,) = pruned.kept
    assert gone in reason
