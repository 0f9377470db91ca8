"""Any order of events: indexes that add, merge and load at once, and are killed in between."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import index_files
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.key_indexes import FOLDER, STEP, index, key, loaded, segment
from tests.support.memory_files import MemoryFile, MemoryFiles


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
