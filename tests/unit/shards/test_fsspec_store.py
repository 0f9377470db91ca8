"""What is particular to stores on fsspec's file systems; what they share with others is in the contract's tests."""

from __future__ import annotations

import asyncio
import errno
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from airflow_vlm_provider.shards.fsspec_store import ONE_REQUEST_BYTES, FsspecStore
from airflow_vlm_provider.shards.stores import NotARegularFileError, ObjectChangedError, StoreError
from tests.support.fsspec_stores import Watched, put, watched_store


@pytest.fixture
def fs() -> Watched:
    return Watched()


@pytest.fixture
def store(fs: Watched) -> FsspecStore:
    return watched_store(fs)


# ---------------------------------------------------------------- the file system


def test_the_file_system_is_made_once_and_not_before_it_is_needed() -> None:
    made: list[str] = []

    def factory(uri: str) -> Watched:
        made.append(uri)
        return Watched()

    store = FsspecStore(uri="memory://mine@bucket/base", filesystem=factory)
    assert made == []
    threads = [threading.Thread(target=lambda: list(store.list())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["memory://mine@bucket/base/"]


def test_the_connection_is_no_part_of_the_path(fs: Watched) -> None:
    put(FsspecStore(uri="memory://mine@bucket/base", filesystem=lambda _: fs), "a")
    assert fs.find("") == ["/bucket/base/a"]


def test_a_factorys_error_is_raised_at_each_use() -> None:
    def factory(uri: str) -> Any:
        raise StoreError("no such connection")

    store = FsspecStore(uri="gs://bucket", filesystem=factory)
    for _ in range(2):
        with pytest.raises(StoreError, match="no such connection"):
            store.stat("a")


def test_the_root_of_a_file_system_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    store = FsspecStore(uri="file:///", filesystem=lambda _: LocalFileSystem())
    entries = store._entries("")
    assert "a" not in entries
    assert f"{tmp_path.parts[1]}/" in entries
    assert store.read(f"{tmp_path}/a"[1:], max_bytes=1) == b"x"


class CachedListings(MemoryFileSystem):
    """Keeps what it has seen, as Google's and Azure's file systems do, until it is told not to."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self.seen.setdefault(f"ls {path}", super().ls(path, detail, **kwargs))

    def info(self, path: str, **kwargs: Any) -> Any:
        return self.seen.setdefault(f"info {path}", super().info(path, **kwargs))

    def invalidate_cache(self, path: str | None = None) -> None:
        if path is None:
            self.seen.clear()


def test_nothing_is_taken_from_a_cache() -> None:
    uri = f"memory://{uuid.uuid4().hex}/base"
    cached = CachedListings()
    store, other = FsspecStore(uri=uri, filesystem=lambda _: cached), FsspecStore(uri=uri)
    put(other, "a", b"1")
    before = store.stat("a")
    put(other, "a", b"22")
    assert store.stat("a") == other.stat("a") != before
    assert [info.name for info in store.list()] == ["a"]
    put(other, "b")
    assert [info.name for info in store.list()] == ["a", "b"]
    put(other, "c")
    assert dict(store.stat_many(["c"])) == {"c": other.stat("c")}


# ---------------------------------------------------------------- listing


def test_hidden_folders_are_not_even_looked_into(fs: Watched, store: FsspecStore) -> None:
    for name in ["a", "b/c", *(f"_vlm/{number}/x" for number in range(20))]:
        put(store, name)
    fs.calls.clear()
    assert [info.name for info in store.list()] == ["a", "b/c"]
    assert fs.calls == ["ls", "ls"]


def test_many_are_looked_up_by_a_listing_a_folder(fs: Watched, store: FsspecStore) -> None:
    every = sorted(f"{folder}{number}" for folder in ("", "a/", "a/b/", "c/") for number in range(25))
    for name in every:
        put(store, name)
    fs.calls.clear()
    # Names of a folder and of those in it come mixed, and no folder is listed twice for it.
    assert all(info for _, info in store.stat_many(every))
    assert fs.calls == ["ls"] * 4


def test_marks_of_folders_are_no_objects(
    fs: Watched, store: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a/b")
    listed = fs.ls("/bucket/base/a")
    mark = {"name": "/bucket/base/a/", "size": 0, "type": "file", "created": 1.0}
    monkeypatch.setattr(fs, "ls", lambda path, detail: [mark, {**mark, "name": "/bucket/base/a"}, *listed])
    assert [info.name for info in store.list("a")] == ["a/b"]


# ---------------------------------------------------------------- reading


def test_what_is_replaced_while_it_is_fetched_is_fetched_again(fs: Watched, store: FsspecStore) -> None:
    put(store, "a", b"old")

    def replace() -> None:
        fs.before.clear()
        put(store, "a", b"the new one")

    # Between the look at the entry and the bytes.
    fs.before["cat_file"] = replace
    assert store.fetch("a", max_bytes=100) == (b"the new one", store.stat("a"))


def test_what_is_replaced_all_the_time_is_told(fs: Watched, store: FsspecStore) -> None:
    put(store, "a", b"old")
    fs.before["cat_file"] = lambda: put(store, "a", b"new")
    with pytest.raises(ObjectChangedError, match="replaced"):
        store.fetch("a", max_bytes=100)


@pytest.mark.parametrize("seekable", [False, True])
def test_bytes_of_two_versions_are_never_joined(fs: Watched, store: FsspecStore, seekable: bool) -> None:
    put(store, "a", b"x" * 10_000_000)
    with (store.open_seekable if seekable else store.open)("a") as stream:
        assert stream.read(10) == b"x" * 10
        put(store, "a", b"y" * 10_000_000)
        with pytest.raises(ObjectChangedError, match="replaced"):
            b"".join(iter(lambda: stream.read(1_000_000), b""))


def test_a_file_system_that_delivers_less_is_asked_for_the_rest(
    fs: Watched, store: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 10
    put(store, "a", data)
    whole = fs.cat_file
    monkeypatch.setattr(fs, "cat_file", lambda path, start, end: whole(path, start, min(end, start + 100)))
    assert store.read("a", max_bytes=len(data)) == data
    with store.open("a") as stream:
        assert stream.read() == data
    monkeypatch.setattr(fs, "cat_file", lambda path, start, end: b"")
    for method in (lambda: store.read("a", max_bytes=len(data)), lambda: store.open("a").read()):
        with pytest.raises(ConnectionError, match="ended after 0 of 2560 bytes"):
            method()


def test_links_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "base/sub").mkdir(parents=True)
    (tmp_path / "base/a").write_bytes(b"a")
    (tmp_path / "base/link").symlink_to(tmp_path / "secret")
    (tmp_path / "base/sub/folder").symlink_to(tmp_path)
    store = FsspecStore(uri=f"file://{tmp_path}/base", filesystem=lambda _: LocalFileSystem())
    assert [info.name for info in store.list()] == ["a"]
    assert dict(store.stat_many(["link"])) == {"link": None}
    for method in (store.stat, store.open, store.open_seekable, lambda name: store.read(name, max_bytes=9)):
        with pytest.raises(NotARegularFileError):
            method("link")


# ---------------------------------------------------------------- writing


class Uploads(AsyncFileSystem):
    """An asynchronous file system, whose uploads of files are its own and show when all has arrived, or never."""

    cachable = False
    protocol = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.files = MemoryFileSystem(global_store=False, skip_instance_cache=True)
        self.uploads: list[str] = []
        self.breaks_off = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path))

    async def _info(self, path: str, **kwargs: Any) -> Any:
        return self.files.info(path)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> Any:
        return self.files.cat_file(path, start, end)

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.files.pipe_file(path, value)

    async def _put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **kwargs: Any) -> None:
        self.uploads.append(rpath)
        if self.breaks_off:
            raise ConnectionResetError("in mid-upload")
        self.files.pipe_file(rpath, await asyncio.to_thread(Path(lpath).read_bytes))


def test_a_large_object_is_uploaded_by_the_file_systems_own_way() -> None:
    fs = Uploads()
    store = FsspecStore(uri="memory://bucket/base", filesystem=lambda _: fs)
    large = bytes(ONE_REQUEST_BYTES + 1)
    put(store, "a", b"small")
    assert fs.uploads == []
    put(store, "a", large)
    assert fs.uploads == ["/bucket/base/a"]
    assert store.read("a", max_bytes=len(large)) == large
    fs.breaks_off = True
    with pytest.raises(ConnectionError, match="mid-upload"):
        put(store, "a", large[::-1] + b"x")
    assert store.read("a", max_bytes=len(large)) == large


def test_no_part_of_an_upload_shows(fs: Watched, store: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # fsspec's own put_file() writes to a stream, which shows what it has when it breaks off.
    put(store, "a", b"old")

    def fail() -> None:
        raise OSError(errno.EIO, "in mid-upload")

    fs.before["pipe_file"] = fail
    monkeypatch.setattr(fs, "put_file", lambda *args, **kwargs: pytest.fail("not atomic"))
    for name in ("a", "b"):
        with pytest.raises(StoreError, match="in mid-upload"):
            put(store, name, bytes(ONE_REQUEST_BYTES + 1))
    assert [(info.name, info.size) for info in store.list()] == [("a", 3)]


class WatchedFiles(LocalFileSystem):
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[str, str]] = []

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:  # type: ignore[override]
        self.moves.append((path1, path2))
        super().mv(path1, path2, **kwargs)


class NeverReplaces(WatchedFiles):
    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:  # type: ignore[override]
        if self.exists(path2):
            raise FileExistsError(errno.EEXIST, "exists", path2)
        super().mv(path1, path2, **kwargs)


def test_where_files_are_moved_a_hidden_one_is_moved_into_place(tmp_path: Path) -> None:
    fs = WatchedFiles()
    store = FsspecStore(uri=f"file://{tmp_path}", filesystem=lambda _: fs)
    put(store, "sub/a", b"x")
    ((source, target),) = fs.moves
    assert target == f"{tmp_path}/sub/a"
    assert Path(source).parent == Path(target).parent
    assert Path(source).name.startswith(".")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a"]


def test_where_no_file_is_moved_over_another_none_is_replaced(tmp_path: Path) -> None:
    fs = NeverReplaces()
    store = FsspecStore(uri=f"file://{tmp_path}", filesystem=lambda _: fs)
    put(store, "a", b"old")
    with pytest.raises(StoreError, match="does not move a file over another"):
        put(store, "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert store.read("a", max_bytes=3) == b"old"
