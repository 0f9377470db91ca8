from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import index_files, key_index
from airflow_vlm_provider.ledger.index_files import MAX_FILES, similar
from airflow_vlm_provider.ledger.key_index import KeyIndex, KeyTable, union
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.memory_files import MemoryFile, MemoryFiles

STEP = "image_tagging"
FOLDER = f"_vlm/_index/{STEP}/keys"


def key(number: int) -> str:
    # As random keys do, small numbers spread over the whole range.
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def segment(shard: int, time: int) -> str:
    return f"_vlm/{shard}.jsonl/{STEP}/journal/20260101T{time:012}-0123abcd-0001-all.jsonl.zst"


def index(files: MemoryFiles | LocalStore) -> KeyIndex:
    return KeyIndex(files, step=STEP)


def loaded(files: MemoryFiles | LocalStore) -> KeyIndex:
    fresh = index(files)
    fresh.load()
    return fresh


def expected(added: dict[str, set[str]], wanted: str) -> list[str]:
    """What a complete and fully merged index finds: the newest segment, and the newest of another shard."""
    names = sorted(added.get(wanted, ()), key=lambda name: (name.split("/")[-1], name), reverse=True)
    others = [name for name in names[1:] if name.split("/")[1] != names[0].split("/")[1]]
    return names if len(names) <= 2 else [names[0], (others or names[1:])[0]]


class Killed(BaseException):
    """Whoever calls is killed in mid-call."""


class WatchedFiles(MemoryFiles):
    """Does something before the n-th call from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.countdown = 0
        self.then: Callable[[str], None] = lambda call: None

    def before(self, calls: int, then: Callable[[str], None]) -> None:
        self.countdown, self.then = calls, then

    def _call(self, call: str) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            self.then(call)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        self._call("read")
        return super().read(name, max_bytes=max_bytes)

    def list(self, folder: str = "") -> Iterator[MemoryFile]:
        self._call("list")
        return super().list(folder)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        self._call("create")
        with super().create(name) as stream:
            yield stream

    def delete(self, name: str) -> None:
        self._call("delete")
        super().delete(name)


def test_an_added_key_is_found_by_everyone_who_loads_the_index_and_by_who_added_it():
    files = MemoryFiles()
    writer = index(files)
    writer.add(segment(1, 1), [key(1), bytes.fromhex(key(2))])
    assert writer.find(key(1)) == [segment(1, 1)]
    reader = loaded(files)
    assert reader.find(key(2)) == [segment(1, 1)]
    assert reader.find(key(3)) == []


def test_there_is_nothing_in_an_index_that_does_not_exist(tmp_path):
    assert loaded(LocalStore(root=str(tmp_path / "missing"))).find(key(1)) == []


def test_segments_are_found_newest_first_whichever_file_names_them():
    files = MemoryFiles()
    for shard, time in ((9, 1), (1, 3), (5, 2)):
        index(files).add(segment(shard, time), [key(1)])
    assert loaded(files).find(key(1)) == [segment(1, 3), segment(5, 2), segment(9, 1)]


def test_what_is_no_key_is_refused():
    with pytest.raises(ValueError, match="no request key"):
        index(MemoryFiles()).add(segment(1, 1), [b"short"])


def test_a_file_says_what_it_is_and_has_20_bytes_for_each_key():
    files = MemoryFiles()
    index(files).add(segment(1, 1), [key(2), key(1), key(2)])
    (data,) = files.files.values()
    header, _, records = data.partition(b"\n")
    assert json.loads(header) == {
        "format": "vlm-key-index",
        "version": 1,
        "records": 2,
        "segments": [segment(1, 1)],
    }
    assert records == b"".join(bytes.fromhex(each) + bytes(4) for each in sorted((key(1), key(2))))


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


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("add", "merge", "load")),
        st.integers(0, 1),  # by which of two indexes
        st.integers(0, 12),  # before which call of it something happens: none for 0, or beyond the last
        st.sampled_from(("killed", "add", "merge", "load")),  # what happens then
        st.tuples(st.integers(0, 3), st.sets(st.integers(0, 9), min_size=1)),
        st.tuples(st.integers(0, 3), st.sets(st.integers(0, 9), min_size=1)),
    ),
    max_size=10,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_any_interleaving_of_adds_merges_and_kills_loses_nothing(actions):
    files, clock = WatchedFiles(), iter(range(1000))
    indexes = (index(files), index(files))
    sure: dict[str, set[str]] = {}
    maybe: dict[str, set[str]] = {}

    def act(what: str, who: int, about: tuple[int, set[int]]) -> None:
        before = {each: set(names) for each, names in sure.items()}
        if what == "add":
            name = segment(about[0], next(clock))
            for number in about[1]:
                maybe.setdefault(key(number), set()).add(name)
            indexes[who].add(name, map(key, about[1]))
            for number in about[1]:
                sure.setdefault(key(number), set()).add(name)
        elif what == "merge":
            indexes[who].merge(max_files=1)
            check(indexes[who], before)
        else:
            indexes[who].load()
            check(indexes[who], before)

    def check(reader: KeyIndex, known: dict[str, set[str]]) -> None:
        for each, names in known.items():
            found = reader.find(each)
            assert set(found) <= maybe[each]
            # The newest of those that were added before is there, unless two newer ones took its place.
            assert len(found) >= min(2, len(names))
            assert found[0].split("/")[-1] >= max(names, key=lambda name: name.split("/")[-1]).split("/")[-1]

    def happens(what: str, who: int, about: tuple[int, set[int]]) -> Callable[[str], None]:
        def then(call: str) -> None:
            if what == "killed":
                raise Killed
            act(what, who, about)

        return then

    with mock.patch.object(index_files, "THREADS", 1):
        for what, who, calls, meanwhile, about, other in actions:
            files.before(calls, happens(meanwhile, 1 - who, other))
            try:
                act(what, who, about)
            except Killed:
                indexes = (index(files), index(files))
            files.before(0, lambda call: None)
        check(loaded(files), sure)
        final = index(files)
        final.merge(max_files=1)
        check(final, sure)
        check(loaded(files), sure)


def test_a_merger_killed_before_it_deletes_has_lost_nothing_and_the_next_one_clears_up(tmp_path):
    store = LocalStore(root=str(tmp_path))
    for number in range(20):
        index(store).add(segment(number, number), [key(number), key(100)])
    code = f"""
import os, signal
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.shards.local import LocalStore

class DiesDeleting(LocalStore):
    def delete(self, name):
        if any(info.name == name for info in self.list({FOLDER!r})):
            os.kill(os.getpid(), signal.SIGKILL)

KeyIndex(DiesDeleting(root={str(tmp_path)!r}), step={STEP!r}).merge()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / FOLDER).iterdir())) == 21
    for merged in (False, True):
        if merged:
            index(store).merge()
            assert len(list((tmp_path / FOLDER).iterdir())) < 5
        reader = loaded(store)
        assert all(segment(number, number) in reader.find(key(number)) for number in range(20))
        assert reader.find(key(100))[:2] == [segment(19, 19), segment(18, 18)]


def test_whoever_loads_during_merges_by_threads_sees_all_that_was_added_before(tmp_path):
    added: list[int] = []
    stop = threading.Event()

    def add(writer: int) -> None:
        mine = index(LocalStore(root=str(tmp_path)))
        for number in range(writer * 1000, writer * 1000 + 60):
            mine.add(segment(writer, number), [key(number)])
            added.append(number)

    def merge() -> None:
        while not stop.is_set():
            index(LocalStore(root=str(tmp_path))).merge(max_files=2)

    def load() -> int:
        loads = 0
        while not stop.is_set():
            known = list(added)
            reader = loaded(LocalStore(root=str(tmp_path)))
            assert [number for number in known if not reader.find(key(number))] == []
            loads += 1
        return loads

    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(merge), threads.submit(merge), threads.submit(load)]
        try:
            list(threads.map(add, range(3)))
        finally:
            stop.set()
        assert others[2].result() > 0
        for other in others:
            other.result()
    reader = loaded(LocalStore(root=str(tmp_path)))
    assert len(added) == 180
    assert [number for number in added if not reader.find(key(number))] == []


def test_mergers_of_the_same_files_at_once_write_the_same_file(tmp_path):
    for number in range(20):
        index(LocalStore(root=str(tmp_path))).add(segment(number, number), [key(number)])
    all_have_read = threading.Barrier(4)

    class Together(LocalStore):
        @contextmanager
        def create(self, name: str) -> Iterator[BinaryIO]:
            all_have_read.wait(30)
            with super().create(name) as stream:
                yield stream

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: index(Together(root=str(tmp_path))).merge(), range(4)))
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_a_listing_that_a_merge_overtook_is_made_good_by_the_next(tmp_path):
    files = WatchedFiles()
    for number in range(20):
        index(files).add(segment(number, number), [key(number)])
    kept = [MemoryFile(name, 1, 0.0) for name in sorted(files.files)[:1]]

    class Overtaken(WatchedFiles):
        """The first listing misses what is deleted before it gets there, and what is created behind it."""

        listings = 0

        def list(self, folder: str = "") -> Iterator[MemoryFile]:
            self.listings += 1
            return iter(kept) if self.listings == 1 else super().list(folder)

    overtaken = Overtaken()
    index(files).merge()
    overtaken.files = files.files
    overtaken.modified = files.modified
    reader = loaded(overtaken)
    assert all(reader.find(key(number)) for number in range(20))


def damage(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[:-7]
    if how == "empty":
        return b""
    middle = len(data) - 30
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_torn_file_is_reported_once_and_left_out_and_outlives_merges(how, caplog):
    files = MemoryFiles()
    index(files).add(segment(0, 0), map(key, range(5)))
    (torn,) = files.files
    files.files[torn] = damage(files.files[torn], how)
    for number in range(20, 40):
        index(files).add(segment(number, number), [key(number)])
    with caplog.at_level(logging.WARNING):
        reader = loaded(files)
    assert [torn in record.getMessage() for record in caplog.records] == [True]
    assert reader.find(key(1)) == []
    assert reader.find(key(39)) == [segment(39, 39)]
    index(files).merge()
    assert len(files.files) == 2
    assert torn in files.files


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": "vlm-key-index", "version": 2, "records": 0, "segments": []}\n',
        b'{"format": "vlm-key-index", "version": 1, "records": 3, "segments": []}\n',
        b'{"format": "vlm-key-index", "version": 1}\n',
        b"[]\n",
        b"\xff\n",
        b"no line",
    ],
)
@pytest.mark.parametrize("named", ["right", "wrong"])
def test_a_file_that_is_not_understood_is_reported_and_never_deleted(content, named, caplog):
    files = MemoryFiles()
    name = (
        f"{FOLDER}/{1:020}-{index_files._hash(content)}.keys" if named == "right" else f"{FOLDER}/notes.txt"
    )
    files.put(name, content)
    for number in range(20):
        index(files).add(segment(number, number), [key(number)])
    index(files).merge()
    assert len(files.files) == 2
    assert files.files[name] == content
    assert name in caplog.text
    assert all(loaded(files).find(key(number)) for number in range(20))


@pytest.mark.parametrize("error", [PermissionError, ConnectionError])
def test_storage_that_refuses_or_is_away_is_an_error(error):
    class Refusing(MemoryFiles):
        def read(self, name: str, *, max_bytes: int) -> bytes:
            raise error(name)

    files = Refusing()
    index(files).add(segment(1, 1), [key(1)])
    with pytest.raises(error):
        loaded(files)
    with pytest.raises(error):
        index(files).merge(max_files=0)
    assert files.deleted == []


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


def test_a_million_keys_take_20_bytes_each():
    records = b"".join(sorted(os.urandom(16) + bytes(4) for _ in range(100_000)))
    table = KeyTable.of([segment(1, 1)], records)
    assert len(table) == 100_000
    assert len(table.data) < 20 * 100_000 + 500


def test_the_index_of_another_step_is_another(tmp_path: Path):
    store = LocalStore(root=str(tmp_path))
    index(store).add(segment(1, 1), [key(1)])
    other = KeyIndex(store, step="image_captioning")
    other.load()
    assert other.find(key(1)) == []
