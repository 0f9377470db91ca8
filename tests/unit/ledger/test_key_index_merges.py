"""How the files of an index become few, and what of them stays."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import index_files, key_index
from airflow_vlm_provider.ledger.index_files import MAX_FILES, similar
from airflow_vlm_provider.ledger.key_index import KeyTable, union
from tests.support.key_indexes import index, key, loaded, segment
from tests.support.memory_files import MemoryFiles


def expected(added: dict[str, set[str]], wanted: str) -> list[str]:
    """What a complete and fully merged index finds: the newest segment, and the newest of another shard."""
    names = sorted(added.get(wanted, ()), key=lambda name: (name.split("/")[-1], name), reverse=True)
    others = [name for name in names[1:] if name.split("/")[1] != names[0].split("/")[1]]
    return names if len(names) <= 2 else [names[0], (others or names[1:])[0]]


TABLES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 30), st.sets(st.integers(0, 12), min_size=1)), max_size=8
)


@given(TABLES, st.sets(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=3), st.integers(1, 40))
def test_a_union_has_the_newest_segments_of_every_key_and_none_that_is_gone(tables, gone, at_once):
    lost = {segment(*each) for each in gone}
    added: dict[str, set[str]] = {}
    made = []
    for shard, time, numbers in tables:
        records = b"".join(bytes.fromhex(each) + bytes(4) for each in sorted(map(key, numbers)))
        made.append(KeyTable.of([segment(shard, time)], records))
        for number in numbers:
            added.setdefault(key(number), set()).update({segment(shard, time)} - lost)
    with mock.patch.object(key_index, "MERGE_RECORDS", at_once):
        middle = len(made) // 2
        whole = union(made, lost)
        halves = union([union(made[:middle], lost), union(made[middle:], lost)], lost)
    for number in range(13):
        found = list(whole.find(bytes.fromhex(key(number))))
        assert found == expected(added, key(number))
        # How files were merged before changes at most which other segment is kept.
        assert list(halves.find(bytes.fromhex(key(number))))[:1] == found[:1]
    assert [whole[place] for place in range(len(whole))] == sorted(
        whole[place] for place in range(len(whole))
    )


def test_segments_that_no_key_needs_any_more_are_forgotten():
    records = bytes.fromhex(key(1)) + bytes(4)
    tables = [KeyTable.of([segment(1, time)], records) for time in range(9)]
    assert union([union(tables)]).segments == [segment(1, 8), segment(1, 7)]


def test_few_files_stay_as_they_are():
    files = MemoryFiles()
    for number in range(MAX_FILES):
        index(files).add(segment(number, number), [key(number)])
    before = dict(files.files)
    index(files).merge()
    assert files.files == before


def test_one_writers_many_files_become_few_without_anybody_merging():
    files = MemoryFiles()
    writer = index(files)
    for number in range(500):
        writer.add(segment(number, number), [key(number)])
        assert len(files.files) <= 2 * MAX_FILES
    reader = loaded(files)
    for each in (writer, reader):
        assert all(each.find(key(number)) == [segment(number, number)] for number in range(500))


class Keeping(MemoryFiles):
    """Deleting is denied."""

    def delete(self, name: str) -> None:
        raise PermissionError(name)


def test_where_deleting_is_denied_the_index_grows_by_what_is_added_and_by_nothing_else(caplog):
    files = Keeping()
    writer = index(files)
    for number in range(3 * MAX_FILES):
        writer.add(segment(number, number), [key(number)])
        merger = index(files)
        merger.merge()
        assert merger.find(key(number)) == [segment(number, number)]
    assert len(files.files) == 3 * MAX_FILES
    assert "could not be merged" in caplog.text
    with pytest.raises(PermissionError):
        index(files).merge(gone={segment(1, 1)})


def test_files_that_cannot_be_merged_are_not_tried_again_with_every_one_that_is_added(caplog):
    writer = index(Keeping())
    for number in range(4 * MAX_FILES):
        writer.add(segment(number, number), [key(number)])
    assert len(caplog.records) == 3


def test_a_merge_that_cannot_delete_in_the_end_loses_nothing():
    class Interrupted(MemoryFiles):
        def delete(self, name: str) -> None:
            if name in self.files:
                raise ConnectionError(name)

    files = Interrupted()
    for number in range(20):
        index(files).add(segment(number, number), [key(number)])
    merger = index(files)
    merger.merge()
    assert len(files.files) == 21
    for reader in (merger, loaded(files)):
        assert all(reader.find(key(number)) == [segment(number, number)] for number in range(20))


def test_an_index_of_many_files_that_must_not_be_merged_is_searched_in_few_tables():
    files = MemoryFiles()
    for number in range(200):
        index(files).add(segment(number, number), [key(number)])
    reader = loaded(files)
    assert len(reader._tables) <= MAX_FILES
    assert len(files.files) == 200
    assert all(reader.find(key(number)) == [segment(number, number)] for number in range(200))


def test_segments_that_are_gone_are_taken_out_wherever_they_are_named():
    files = MemoryFiles()
    for number in range(20):
        index(files).add(segment(number, number), [key(number), key(100)])
    index(files).merge()
    index(files).add(segment(50, 50), [key(50), key(100)])
    index(files).add(segment(51, 51), [key(51)])
    pruner = index(files)
    pruner.merge(gone={segment(50, 50), segment(19, 19), segment(7, 7)})
    for reader in (pruner, loaded(files)):
        assert reader.find(key(50)) == reader.find(key(19)) == reader.find(key(7)) == []
        assert reader.find(key(51)) == [segment(51, 51)]
        assert reader.find(key(100)) == [segment(18, 18)]
        assert reader.find(key(6)) == [segment(6, 6)]
    assert not any(segment(50, 50).encode() in data for data in files.files.values())


@given(st.lists(st.integers(1, 10**9), max_size=60))
def test_what_is_merged_is_of_similar_size_and_what_stays_is_few(sizes):
    by_name = {str(place): size for place, size in enumerate(sizes)}
    groups = similar(by_name)
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    left = len(sizes) - len(names) + len(groups)
    # Each that stays is more than twice as large as the one before, unless it would become too large.
    assert left <= 31 + 2 * sum(sizes) // index_files.MAX_MERGED_BYTES
    for group in groups:
        assert len(group) > 1
        assert sum(by_name[name] for name in group) <= index_files.MAX_MERGED_BYTES
        assert max(by_name[name] for name in group) <= index_files.SIMILAR * (
            sum(by_name[name] for name in group) - max(by_name[name] for name in group)
        )
