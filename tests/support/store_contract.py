"""The contract of stores as tests; a test module makes a class of them for the stores that it has.

A subclass defines the fixture ``opener``: a function that opens the store at the test's own, empty place, anew with
each call, as another process would.
"""

from __future__ import annotations

import io
import itertools
import random
import threading
from collections.abc import Callable, Iterator

import pytest

from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    ObjectChangedError,
    ObjectInfo,
    ObjectTooLargeError,
    OutsideRootError,
    Store,
)

Opener = Callable[[], Store]

# Longer than what is buffered and spooled anywhere, and nowhere like itself.
LONG = random.Random(0).randbytes(9 * 2**20)
OTHER = random.Random(1).randbytes(9 * 2**20)

# "." and "-" sort before "/", digits after it: a walk by directories would give another order.
NAMES = sorted(["a/b", "a.txt", "a-b/c", "a0", "a/b.c/d", "é/ü 1%20?#[x]*.jpg", "z/y/x"])
HIDDEN = ["_vlm/a.jsonl/step/journal/1", "_vlm/a.jsonl/step/_tmp/2", ".a.tmp", "b/_c", "b/.d/e"]
OUTSIDE = ["/etc/passwd", "..", "../x", "a/../b", "a/..", "//x"]
INVALID = ["", ".", "a/", "a//b", "./a", "a/./b", "a\\b", "a\0b", "a\ud800"]


def put(store: Store, name: str, data: bytes = b"data") -> ObjectInfo:
    with store.create(name) as stream:
        stream.write(data)
    return store.stat(name)


def names(store: Store, folder: str = "") -> list[str]:
    return [info.name for info in store.list(folder)]


class StoreContract:
    """What holds for every store."""

    # Whether a name can be that of a directory with nothing in it.
    has_directories = True

    @pytest.fixture
    def store(self, opener: Opener) -> Store:
        return opener()

    # --- listing -----------------------------------------------------------------------------------------------

    def test_everything_is_listed_sorted_by_name(self, store: Store) -> None:
        for name in reversed(NAMES):
            put(store, name, name.encode())
        listed = list(store.list())
        assert [info.name for info in listed] == NAMES
        assert [info.size for info in listed] == [len(name.encode()) for name in NAMES]

    def test_what_is_no_data_is_left_out(self, store: Store) -> None:
        for name in ["a", "b/c", *HIDDEN]:
            put(store, name)
        assert names(store) == ["a", "b/c"]

    def test_a_folder_is_listed_with_names_relative_to_the_root(self, store: Store) -> None:
        for name in [
            "b",
            "b.c",
            "bb/c",
            *(f"a/{name}" for name in ["b", "c/d", "_e", "f/.g/h"]),
            "a.c",
            "aa/b",
        ]:
            put(store, name)
        assert names(store, "a") == ["a/b", "a/c/d"]
        assert names(store, "a/c") == ["a/c/d"]

    def test_the_folders_own_name_may_be_hidden(self, store: Store) -> None:
        for name in ["a", *HIDDEN]:
            put(store, name)
        assert names(store, "_vlm/a.jsonl/step/journal") == ["_vlm/a.jsonl/step/journal/1"]
        # What is hidden below it is left out all the same.
        assert names(store, "_vlm/a.jsonl") == ["_vlm/a.jsonl/step/journal/1"]
        assert names(store, "b/.d") == ["b/.d/e"]

    def test_what_does_not_exist_has_no_objects(self, store: Store) -> None:
        assert names(store) == []
        put(store, "a")
        for folder in ["none", "none/none", "a", "a/b"]:
            assert names(store, folder) == []

    # --- looking up --------------------------------------------------------------------------------------------

    def test_an_entry_is_the_same_wherever_it_is_asked_for(self, opener: Opener) -> None:
        info = put(opener(), "a/b", b"12345")
        store = opener()
        assert (info.name, info.size) == ("a/b", 5)
        assert list(store.list()) == [info]
        assert list(store.list("a")) == [info]
        assert list(store.stat_many(["a/b"])) == [("a/b", info)]
        assert store.fetch("a/b", max_bytes=5)[1] == info
        # In seconds, not in milliseconds, and whole ones at least.
        assert 1.6e9 < info.modified < 1e11
        for other in [*store.list(), store.fetch("a/b", max_bytes=5)[1]]:
            assert int(other.modified) == int(info.modified)

    def test_the_identity_changes_with_the_content(self, opener: Opener) -> None:
        store, other = opener(), opener()
        before = put(store, "a", b"1")
        list(other.list())
        assert put(store, "a", b"2").identity != before.identity
        assert other.stat("a") == store.stat("a")
        assert put(store, "a", b"22").identity != before.identity
        assert list(other.list()) == [store.stat("a")]

    def test_many_are_looked_up_as_one_is(self, opener: Opener) -> None:
        store = opener()
        there = [*NAMES, *HIDDEN]
        for name in there:
            put(store, name)
        absent = ["0", "a", "a/b.c", "a/b.c/d/e", "a/c", "b", "b/_c/x", "zz", "z/y/x0", "none/none"]
        wanted = sorted([*there, *absent, *OUTSIDE, *INVALID[1:]])
        found = dict(opener().stat_many(iter(wanted)))
        assert list(found) == wanted
        assert {name: info for name, info in found.items() if info is not None} == {
            name: store.stat(name) for name in there
        }

    def test_names_are_looked_up_as_they_come(self, store: Store) -> None:
        put(store, "a")

        def endless() -> Iterator[str]:
            yield "a"
            raise RuntimeError("not asked for yet")

        assert next(iter(store.stat_many(endless()))) == ("a", store.stat("a"))

    @pytest.mark.parametrize("wanted", [["b", "a"], ["a", "a"]])
    def test_names_out_of_order_are_not_taken_for_absent(self, store: Store, wanted: list[str]) -> None:
        for name in wanted:
            put(store, name)
        with pytest.raises(ValueError, match="have to be sorted"):
            list(store.stat_many(wanted))

    def test_what_is_not_there_is_told(self, store: Store) -> None:
        put(store, "a/b")
        for name in ["none", "a/none", "a/b/c"]:
            for method in (store.stat, store.open, store.open_version, store.open_seekable):
                with pytest.raises(FileNotFoundError):
                    method(name)
            with pytest.raises(FileNotFoundError):
                store.read(name, max_bytes=1)
            with pytest.raises(FileNotFoundError):
                store.fetch(name, max_bytes=1)

    def test_a_directory_is_told(self, store: Store) -> None:
        put(store, "a/b")
        error = IsADirectoryError if self.has_directories else FileNotFoundError
        for method in (store.stat, store.open, store.open_version, store.open_seekable):
            with pytest.raises(error):
                method("a")
        with pytest.raises(error):
            store.read("a", max_bytes=1)

    # --- names -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", OUTSIDE + INVALID)
    def test_no_name_leads_astray(self, store: Store, name: str) -> None:
        put(store, "a/b")
        error = OutsideRootError if name in OUTSIDE else InvalidNameError
        for method in (store.stat, store.open, store.open_version, store.open_seekable, store.delete):
            with pytest.raises(error):
                method(name)
        for method in (store.read, store.fetch):
            with pytest.raises(error):
                method(name, max_bytes=1)  # type: ignore[operator]
        with pytest.raises(error), store.create(name):
            pass
        if name:
            with pytest.raises(error):
                list(store.list(name))
        assert names(store) == ["a/b"]

    # --- reading -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"x", LONG], ids=len)
    def test_what_was_written_is_read(self, store: Store, data: bytes) -> None:
        info = put(store, "a", data)
        with store.open("a") as stream:
            assert stream.read() == data
            assert stream.read() == b""
        with store.open("a") as stream:
            assert b"".join(iter(lambda: stream.read(1_000_003), b"")) == data
        assert store.read("a", max_bytes=len(data)) == data
        assert store.fetch("a", max_bytes=len(data)) == (data, info)

    def test_no_more_is_read_than_is_taken(self, store: Store) -> None:
        put(store, "a", b"12345")
        for method in (store.read, store.fetch):
            with pytest.raises(ObjectTooLargeError):
                method("a", max_bytes=4)  # type: ignore[operator]

    def test_a_seekable_stream_reads_here_and_there(self, store: Store) -> None:
        put(store, "a", LONG)
        with store.open_seekable("a") as stream:
            assert stream.seekable()
            assert stream.readable()
            assert stream.seek(0, io.SEEK_END) == len(LONG) == stream.tell()
            assert stream.read(1) == b""
            assert stream.seek(-10, io.SEEK_END) == len(LONG) - 10
            assert stream.read(100) == LONG[-10:]
            assert stream.seek(1000) == 1000
            assert stream.read(5_000_000) == LONG[1000:5_001_000]
            assert stream.seek(-10, io.SEEK_CUR) == 5_000_990
            assert stream.read() == LONG[5_000_990:]
            assert stream.seek(len(LONG) + 5) == len(LONG) + 5
            assert stream.read(1) == b""
            with pytest.raises((ValueError, OSError)):
                stream.seek(-1)
        with pytest.raises(ValueError):
            stream.read(1)

    def test_pyarrow_reads_parquet_from_a_seekable_stream(self, store: Store) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"n": list(range(50_000)), "text": [str(number) * 5 for number in range(50_000)]})
        with store.create("a.parquet") as stream:
            pq.write_table(table, stream, row_group_size=7000)
        with store.open_seekable("a.parquet") as stream, pq.ParquetFile(stream) as file:
            assert file.num_row_groups == 8
            assert file.read_row_group(3, columns=["n"])["n"].to_pylist() == list(range(21_000, 28_000))
            assert pa.Table.from_batches(file.iter_batches(999)) == table

    @pytest.mark.parametrize("seekable", [False, True])
    @pytest.mark.parametrize("then", ["replaced", "deleted"])
    def test_a_stream_delivers_one_version_or_raises(self, store: Store, seekable: bool, then: str) -> None:
        put(store, "a", LONG)
        with (store.open_seekable if seekable else store.open)("a") as stream:
            data = stream.read(10)
            if then == "replaced":
                put(store, "a", OTHER)
            else:
                store.delete("a")
            try:
                data += b"".join(iter(lambda: stream.read(3_000_000), b""))
            except ObjectChangedError:
                return
        assert data == LONG

    def test_bytes_are_fetched_with_the_entry_of_their_very_version(self, opener: Opener) -> None:
        contents = [bytes([number]) * (1000 + number) for number in range(60)]
        store, other = opener(), opener()
        written = {put(store, "a", contents[0]).identity: contents[0]}
        stopping = threading.Event()

        def replace() -> None:
            for content in itertools.cycle(contents):
                if stopping.is_set():
                    return
                put(other, "a", content)

        writer = threading.Thread(target=replace)
        writer.start()
        try:
            for _ in range(40):
                try:
                    data, info = store.fetch("a", max_bytes=2000)
                except ObjectChangedError:
                    continue
                assert len(data) == info.size
                assert data in contents
                assert written.setdefault(info.identity, data) == data
        finally:
            stopping.set()
            writer.join()

    def test_a_stream_comes_with_the_entry_of_its_very_version(self, opener: Opener) -> None:
        store = opener()
        info = put(store, "a", LONG)
        stream, entry = store.open_version("a")
        with stream:
            assert entry == info
            assert stream.read() == LONG
        put(opener(), "a", LONG[::-1])
        stream, entry = store.open_version("a")
        with stream:
            assert entry == store.stat("a") != info
            assert stream.read() == LONG[::-1]

    def test_many_threads_read_one_object(self, store: Store) -> None:
        put(store, "a", LONG)
        read: list[bytes] = []

        def read_all() -> None:
            with store.open("a") as stream:
                read.append(b"".join(iter(lambda: stream.read(1_000_000), b"")))

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(read) == 4
        assert all(data == LONG for data in read)

    # --- writing -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("new", [b"new", LONG], ids=len)
    def test_an_object_shows_whole_when_the_body_has_ended(self, opener: Opener, new: bytes) -> None:
        store, other = opener(), opener()
        put(store, "sub/a", b"old")
        with store.create("sub/a") as stream, store.create("sub/b") as second:
            for each in (stream, second):
                each.write(new)
                each.flush()
            assert other.read("sub/a", max_bytes=10) == b"old"
            assert names(other) == ["sub/a"]
        assert other.read("sub/a", max_bytes=len(new)) == new
        assert other.read("sub/b", max_bytes=len(new)) == new
        assert names(other) == ["sub/a", "sub/b"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_nothing_shows_of_a_body_that_raises(self, store: Store, error: type[BaseException]) -> None:
        put(store, "a", b"old")

        def fail(name: str) -> None:
            with store.create(name) as stream:
                stream.write(LONG)
                raise error

        for name in ("a", "b", "c/d"):
            with pytest.raises(error):
                fail(name)
        assert names(store) == ["a"]
        assert store.read("a", max_bytes=3) == b"old"

    def test_of_writers_at_once_one_wins_whole(self, opener: Opener) -> None:
        writers = 4
        meeting = threading.Barrier(writers)
        seen: list[bytes] = []

        def write(number: int) -> None:
            store = opener()
            with store.create("a") as stream:
                meeting.wait()
                for _ in range(30):
                    stream.write(bytes([number]) * 10_000)
                meeting.wait()
            try:
                seen.append(store.read("a", max_bytes=10**6))
            except ObjectChangedError:
                seen.append(bytes(300_000))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == writers
        assert all(len(data) == 300_000 and len(set(data)) == 1 for data in seen)
        assert names(opener()) == ["a"]

    # --- deleting ----------------------------------------------------------------------------------------------

    def test_what_is_deleted_is_gone(self, opener: Opener) -> None:
        store, other = opener(), opener()
        for name in ["a/b", "a/c", "_d/e"]:
            put(store, name)
        assert names(other) == ["a/b", "a/c"]
        store.delete("a/b")
        store.delete("_d/e")
        assert names(other) == ["a/c"]
        assert names(other, "_d") == []
        with pytest.raises(FileNotFoundError):
            other.stat("a/b")
        put(store, "a/b", b"again")
        assert other.read("a/b", max_bytes=5) == b"again"

    def test_to_delete_nothing_is_no_error(self, store: Store) -> None:
        put(store, "a/b")
        for name in ["none", "none/none", "a/b/c", "a"]:
            store.delete(name)
        assert names(store) == ["a/b"]
