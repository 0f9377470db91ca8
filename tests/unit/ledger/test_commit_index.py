from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.ledger.commit_index import CommitEntry, CommitIndex
from airflow_vlm_provider.ledger.index_files import MAX_FILES
from tests.support.memory_files import MemoryFiles

FOLDER = "_vlm/_index/image_tagging/commits"


def index(files: MemoryFiles) -> CommitIndex:
    return CommitIndex(files, step="image_tagging")


def entry(shard: str, second: int = 0, **changes: object) -> CommitEntry:
    made = CommitEntry(
        shard=shard,
        fingerprint="f" * 64,
        input="etag-1",
        output_name=shard,
        output="etag-2",
        rows_in=1000,
        rows_out=1000,
        skipped=0,
        failed=0,
        kinds={},
        media=False,
        finished_at=f"2026-01-01T00:00:{second:02}.000001+00:00",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_commits_come_back_as_they_were_added():
    files = MemoryFiles()
    entries = [
        entry("a/ß\u2028.jsonl"),
        entry("b.parquet", output_name="b.sidecar.parquet", failed=3, kinds={"transient": 3}, media=True),
    ]
    index(files).add(entries)
    assert index(files).load() == {each.shard: each for each in entries}


def test_a_file_is_json_lines_that_standard_tools_read():
    files = MemoryFiles()
    entries = [entry("b.jsonl"), entry("a.jsonl", kinds={"refused": 1}, failed=1)]
    index(files).add(entries)
    ((name, data),) = files.files.items()
    assert name.startswith(f"{FOLDER}/")
    assert name.endswith(".jsonl.zst")
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(data).splitlines()
    assert [json.loads(line) for line in lines] == [asdict(entries[1]), asdict(entries[0])]


def test_nothing_is_written_for_no_commits():
    files = MemoryFiles()
    index(files).add([])
    assert files.files == {}
    assert index(files).load() == {}


ADDS = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 3)), max_size=4), max_size=12
)


@given(ADDS, st.sets(st.integers(0, 11)))
def test_of_a_shards_commits_the_last_to_finish_counts_whatever_was_merged(adds, merges):
    files, latest = MemoryFiles(), {}
    for place, commits in enumerate(adds):
        entries = [entry(shard, second, input=f"etag-{version}") for shard, second, version in commits]
        index(files).add(entries)
        for each in entries:
            other = latest.get(each.shard)
            if other is None or (each.finished_at, each.input) > (other.finished_at, other.input):
                latest[each.shard] = each
        if place in merges:
            assert index(files).merge(max_files=1) == latest
    assert index(files).load() == latest


def test_many_files_become_few():
    files = MemoryFiles()
    for number in range(50):
        index(files).add([entry(f"{number}.jsonl")])
    before = index(files).load()
    assert len(files.files) == 50
    assert index(files).merge() == before
    assert len(files.files) <= MAX_FILES
    assert index(files).load() == before


def test_one_writers_many_files_become_few_without_anybody_merging():
    files = MemoryFiles()
    writer = index(files)
    for number in range(200):
        writer.add([entry(f"{number}.jsonl")])
        assert len(files.files) <= 2 * MAX_FILES
    assert set(index(files).load()) == {f"{number}.jsonl" for number in range(200)}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: b"", lambda data: data[:20] + b"\0" + data[21:]]
)
def test_a_torn_file_is_reported_and_left_out_and_outlives_merges(damage, caplog):
    files = MemoryFiles()
    index(files).add([entry("torn.jsonl")])
    (torn,) = files.files
    files.files[torn] = damage(files.files[torn])
    for number in range(20):
        index(files).add([entry(f"{number}.jsonl")])
    with caplog.at_level(logging.WARNING):
        commits = index(files).merge()
    assert torn in caplog.text
    assert set(commits) == {f"{number}.jsonl" for number in range(20)}
    assert torn in files.files
    assert index(files).load() == commits
