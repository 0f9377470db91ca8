from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from airflow_vlm_provider.shards.local import ABANDONED_S, LocalStore
from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    NotARegularFileError,
    ObjectChangedError,
    ObjectTooLargeError,
    OutsideRootError,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    return directory


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root=str(root))


def put(root: Path, name: str, data: bytes = b"data") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(store: LocalStore) -> list[str]:
    return [info.name for info in store.list()]


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_list_is_recursive_and_sorted_as_names_are(root: Path, store: LocalStore) -> None:
    # "." and "-" sort before "/", digits after it: a walk by directories would give another order.
    expected = sorted(["a/b", "a.txt", "a-b/c", "a0", "a/b.c/d", "é", "z/y/x"])
    for name in expected:
        put(root, name, name.encode())
    assert names(store) == expected
    assert [info.size for info in store.list()] == [len(name.encode()) for name in expected]


def test_list_leaves_out_what_is_no_data(root: Path, store: LocalStore) -> None:
    for name in ["a", "_vlm/a/manifest.json", ".a.tmp", "b/_c", "b/.d/e"]:
        put(root, name)
    os.mkfifo(root / "fifo")
    assert names(store) == ["a"]


def test_a_root_that_does_not_exist_lists_nothing(tmp_path: Path) -> None:
    assert names(LocalStore(root=str(tmp_path / "none"))) == []


def test_identity_changes_with_the_content(root: Path, store: LocalStore) -> None:
    path = put(root, "a", b"1")
    (before,) = store.list()
    assert store.stat("a") == before
    path.write_bytes(b"2")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert store.stat("a").identity != before.identity


def test_what_is_missing_or_a_directory_is_told(root: Path, store: LocalStore) -> None:
    put(root, "a/b")
    for name, error in [
        ("none", FileNotFoundError),
        ("a/b/c", FileNotFoundError),
        ("a", IsADirectoryError),
    ]:
        with pytest.raises(error):
            store.stat(name)
        with pytest.raises(error):
            store.open(name)
        with pytest.raises(error):
            store.read(name, max_bytes=1)
    with pytest.raises(IsADirectoryError), store.create("a"):
        pass


def test_read_takes_an_object_up_to_its_bound(root: Path, store: LocalStore) -> None:
    put(root, "a", b"12345")
    put(root, "empty", b"")
    assert store.read("a", max_bytes=5) == b"12345"
    assert store.read("empty", max_bytes=0) == b""
    with pytest.raises(ObjectTooLargeError, match="larger than 4 bytes"):
        store.read("a", max_bytes=4)


def test_read_does_not_trust_a_size_of_zero() -> None:
    # Files of /proc claim to be empty.
    with pytest.raises(ObjectTooLargeError):
        LocalStore(root="/proc").read("self/status", max_bytes=10)


@pytest.mark.timeout(20)
def test_special_files_are_refused_and_never_waited_for(root: Path, store: LocalStore) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        for name in ("fifo", "socket"):
            for method in (store.stat, store.open, lambda name: store.read(name, max_bytes=1)):
                with pytest.raises(NotARegularFileError):
                    method(name)
    with pytest.raises(NotARegularFileError):
        LocalStore(root="/dev").open("null")


@pytest.mark.timeout(20)
def test_a_fifo_that_takes_a_files_place_is_not_waited_for(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "a")
    monkeypatch.setattr("airflow_vlm_provider.shards.local._regular_file", lambda path: path.stat())
    with store.open("a") as stream:
        assert not stream.read(1)


def test_links_are_followed_within_the_root_only(root: Path, store: LocalStore, tmp_path: Path) -> None:
    secret = put(tmp_path, "secret", b"secret")
    put(root, "data/a", b"inside")
    (root / "inside").symlink_to("data/a")
    (root / "data/up").symlink_to("../data")
    assert store.read("inside", max_bytes=10) == b"inside"
    assert store.read("data/up/a", max_bytes=10) == b"inside"
    assert names(store) == ["data/a", "inside"]

    (root / "data/file").symlink_to(secret)
    (root / "data/directory").symlink_to(tmp_path)
    for name in ["data/file", "data/directory/secret", "data/up/file", "data/directory/base/data/file"]:
        for method in (store.stat, store.open, lambda name: store.read(name, max_bytes=10)):
            with pytest.raises(OutsideRootError, match="choose a root"):
                method(name)
    with pytest.raises(OutsideRootError), store.create("data/directory/new"):
        pass
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutsideRootError):
        names(store)


def test_a_sibling_whose_name_begins_like_the_roots_is_outside(
    root: Path, store: LocalStore, tmp_path: Path
) -> None:
    put(tmp_path, "base-other/a")
    (root / "link").symlink_to(tmp_path / "base-other/a")
    with pytest.raises(OutsideRootError):
        store.open("link")


def test_a_link_as_the_root_is_the_authors_choice(root: Path, tmp_path: Path) -> None:
    put(root, "a")
    (tmp_path / "link").symlink_to(root)
    linked = LocalStore(root=str(tmp_path / "link"))
    assert linked.read("a", max_bytes=4) == b"data"
    assert names(linked) == ["a"]


def test_a_root_may_be_there_later_as_a_link_too(root: Path, tmp_path: Path) -> None:
    put(root, "data/a")
    (root / "link").symlink_to("data")
    store = LocalStore(root=str(tmp_path / "later"))
    with pytest.raises(FileNotFoundError):
        store.read("link/a", max_bytes=4)
    (tmp_path / "later").symlink_to(root)
    assert store.read("link/a", max_bytes=4) == b"data"


def test_many_are_looked_up_through_links_as_one_is(root: Path, store: LocalStore, tmp_path: Path) -> None:
    put(tmp_path, "secret")
    put(root, "data/a")
    (root / "file").symlink_to("data/a")
    (root / "folder").symlink_to("data")
    (root / "data/out").symlink_to(tmp_path / "secret")
    (root / "out").symlink_to(tmp_path)
    (root / "nothing").symlink_to("none")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    there = ["data/a", "file", "folder/a"]
    absent = ["data", "data/out", "fifo", "folder", "folder/out", "loop", "loop/x", "nothing", "out/secret"]
    found = dict(store.stat_many(sorted([*there, *absent])))
    assert {name: info for name, info in found.items() if info} == {name: store.stat(name) for name in there}


def test_of_many_in_one_folder_the_folder_is_resolved_once(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [f"a/{number:04}" for number in range(1000)]
    for name in every:
        put(root, name, b"")
    resolved: list[str] = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: (resolved.append(str(path)), realpath(path))[1])
    assert all(info for _, info in store.stat_many(every))
    assert len(resolved) < 10


def test_a_folder_that_is_a_link_is_listed_within_the_root_only(
    root: Path, store: LocalStore, tmp_path: Path
) -> None:
    put(root, "data/a")
    put(tmp_path, "other/b")
    (root / "in").symlink_to("data")
    (root / "out").symlink_to(tmp_path / "other")
    assert [info.name for info in store.list("in")] == ["in/a"]
    with pytest.raises(OutsideRootError):
        list(store.list("out"))


def test_delete_removes_a_link_and_not_what_it_leads_to(
    root: Path, store: LocalStore, tmp_path: Path
) -> None:
    other = put(tmp_path, "other", b"other")
    (root / "link").symlink_to(other)
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    store.delete("link")
    store.delete("fifo")
    with pytest.raises(OutsideRootError):
        store.delete("folder/other")
    assert other.read_bytes() == b"other"
    assert sorted(path.name for path in root.iterdir()) == ["fifo", "folder"]


def test_a_file_written_to_while_it_is_fetched_is_told(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(root, "a", b"12345")
    fstat = os.fstat

    def fstat_and_write(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        path.write_bytes(b"54321")
        os.utime(path, ns=(0, status.st_mtime_ns + 1))
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_write)
    with pytest.raises(ObjectChangedError, match="written to while it was being read"):
        store.fetch("a", max_bytes=5)


def test_links_to_nothing_and_loops(root: Path, store: LocalStore) -> None:
    (root / "nothing").symlink_to("none")
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to(".")
    put(root, "a")
    with pytest.raises(FileNotFoundError):
        store.open("nothing")
    with pytest.raises(InvalidNameError):
        store.open("loop")
    assert names(store) == ["a"]


def test_create_replaces_a_link_and_not_what_it_leads_to(
    root: Path, store: LocalStore, tmp_path: Path
) -> None:
    other = put(tmp_path, "other", b"other")
    (root / "link").symlink_to(other)
    with store.create("link") as stream:
        stream.write(b"new")
    assert (other.read_bytes(), (root / "link").read_bytes()) == (b"other", b"new")


def test_create_shows_the_object_whole_at_the_end(root: Path, store: LocalStore) -> None:
    put(root, "sub/a", b"old")
    with store.create("sub/a") as stream:
        stream.write(b"new" * 100_000)
        stream.flush()
        assert (root / "sub/a").read_bytes() == b"old"
        assert names(store) == ["sub/a"]
    assert (root / "sub/a").read_bytes() == b"new" * 100_000
    assert everything(root) == ["sub/a"]


def test_create_makes_directories_and_files_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with LocalStore(root=str(tmp_path / "new/base")).create("_vlm/a") as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new/base/_vlm/a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_create_leaves_nothing_when_the_body_raises(
    root: Path, store: LocalStore, error: type[BaseException]
) -> None:
    put(root, "a", b"old")

    def fail(name: str) -> None:
        with store.create(name) as stream:
            stream.write(b"half")
            raise error

    for name in ("a", "b"):
        with pytest.raises(error):
            fail(name)
    assert everything(root) == ["a"]
    assert (root / "a").read_bytes() == b"old"


def test_what_was_created_is_synced_before_and_after_it_is_named(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append("replace")
        assert self.read_bytes() == b"new"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    with store.create("a") as stream:
        stream.write(b"new")
    temporary, *rest = events
    assert temporary.startswith(".")
    assert rest == ["replace", "base"]


KILLED = """
import sys
from airflow_vlm_provider.shards.opening import open_store
with open_store(sys.argv[1]).create("a.jsonl") as stream:
    stream.write(b"half" * 100_000)
    stream.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_nothing_visible(root: Path, store: LocalStore) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    assert everything(root) != []
    assert names(store) == []
    with store.create("a.jsonl") as stream:
        stream.write(b"whole")
    assert store.read("a.jsonl", max_bytes=5) == b"whole"


def test_what_killed_writers_left_is_removed_when_it_is_a_day_old(root: Path, store: LocalStore) -> None:
    old, young = f".{'0' * 32}.tmp", f".{'1' * 32}.tmp"
    others = [".keep.tmp", f"{'2' * 32}.tmp", f".{'3' * 32}.tmp.txt"]
    for name in [old, young, *others]:
        put(root, f"sub/{name}")
    put(root, f"elsewhere/{old}")
    for name in [f"sub/{old}", f"elsewhere/{old}", *(f"sub/{other}" for other in others)]:
        os.utime(root / name, (time.time() - ABANDONED_S - 60,) * 2)
    os.utime(root / "sub" / young, (time.time() - ABANDONED_S + 600,) * 2)
    with store.create("sub/a") as stream:
        stream.write(b"x")
    assert everything(root) == sorted(
        [f"elsewhere/{old}", "sub/a", *(f"sub/{name}" for name in [young, *others])]
    )


def test_what_can_not_be_cleared_away_keeps_no_one_from_writing(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = put(root, f".{'0' * 32}.tmp")
    os.utime(left, (0, 0))

    def deny(path: object) -> None:
        raise PermissionError(f"{path} is somebody else's")

    monkeypatch.setattr(os, "unlink", deny)
    with store.create("a") as stream:
        stream.write(b"x")
    assert store.read("a", max_bytes=1) == b"x"


def test_writers_at_once_do_not_mix(root: Path, store: LocalStore) -> None:
    writers = 8
    meeting = threading.Barrier(writers)
    seen: list[bytes] = []

    def write(number: int) -> None:
        with store.create("a") as stream:
            meeting.wait()
            for _ in range(100):
                stream.write(bytes([number]) * 1000)
                stream.flush()
            meeting.wait()
        seen.append(store.read("a", max_bytes=10**6))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == writers
    assert all(len(data) == 100_000 and len(set(data)) == 1 for data in seen)
    assert everything(root) == ["a"]
