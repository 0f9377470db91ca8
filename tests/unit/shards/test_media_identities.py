"""What was looked at for a reference, and that its identities change when the reference means something else."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.http_media import HttpFetcher
from airflow_vlm_provider.shards.http_urls import HttpUrl
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.stores import ObjectInfo
from airflow_vlm_provider.types import Looked, MediaRef
from tests.support.media_folders import JPEG, SECRET, dataset_folder, load, loader, looked_at


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dataset_folder(tmp_path)


def identities_now(loader: MediaLoader, looked: Looked) -> Looked:
    now = dict(loader.identities(sorted(uri for uri, _ in looked)))
    return tuple((uri, now[uri]) for uri, _ in looked)


def test_everything_that_was_looked_at_is_told_in_order(data: Path, tmp_path: Path) -> None:
    shared = loader(data, roots=[str(data), str(tmp_path / "outside")])
    beside, below, outside_below, outside = (
        f"file://{data}/shards/secret.png",
        f"file://{data}/secret.png",
        f"file://{tmp_path}/outside/shards/secret.png",
        f"file://{tmp_path}/outside/secret.png",
    )
    looked = looked_at(shared, "secret.png")
    assert [uri for uri, _ in looked] == [beside, outside_below, below, outside]
    assert [identity is None for _, identity in looked] == [True, True, True, False]
    (tmp_path / "outside" / "secret.png").unlink()
    assert looked_at(shared, "secret.png") == tuple((uri, None) for uri, _ in looked)
    (data / "shards" / "secret.png").write_bytes(SECRET)
    assert [uri for uri, _ in looked_at(shared, "secret.png")] == [beside]
    assert looked_at(shared, "/etc/passwd") == ()


def make_nothing(data: Path, elsewhere: Path) -> None:
    """There is nothing at all."""


def make_file(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").write_bytes(JPEG)


def make_file_in_the_second_root(data: Path, elsewhere: Path) -> None:
    (elsewhere / "x.jpg").write_bytes(JPEG)


def make_link_within_the_root(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").symlink_to(data / "a.jpg")


def make_link_to_another_root(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").symlink_to(elsewhere / "secret.png")


def make_link_to_a_link_in_another_root(data: Path, elsewhere: Path) -> None:
    (elsewhere / "y.png").symlink_to("secret.png")
    (data / "shards" / "x.jpg").symlink_to(elsewhere / "y.png")


def make_link_out_of_all_roots(data: Path, elsewhere: Path) -> None:
    (data.parent / "far.jpg").write_bytes(JPEG)
    (data / "shards" / "x.jpg").symlink_to(data.parent / "far.jpg")


def make_dangling_link(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").symlink_to(elsewhere / "nothing")


def make_directory(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").mkdir()


def make_link_to_a_directory_in_another_root(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").symlink_to(elsewhere)


def make_fifo(data: Path, elsewhere: Path) -> None:
    os.mkfifo(data / "shards" / "x.jpg")


def make_too_large(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").write_bytes(b"x" * 100_000)


def make_loop_of_links(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").symlink_to("x.jpg")


def make_corrupt(data: Path, elsewhere: Path) -> None:
    (data / "shards" / "x.jpg").write_bytes(b"no picture")


MAKERS = [make for name, make in sorted(globals().items()) if name.startswith("make_")]


@pytest.mark.parametrize("make", MAKERS)
def test_where_nothing_has_changed_identities_are_the_same(
    data: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    elsewhere = tmp_path / "outside"
    make(data, elsewhere)
    shared = loader(data, roots=[str(data), str(elsewhere)], max_bytes=50_000)
    looked = looked_at(shared, "x.jpg")
    assert looked
    assert identities_now(shared, looked) == looked


@pytest.mark.parametrize("before", MAKERS)
@pytest.mark.parametrize("after", MAKERS)
def test_whatever_changes_what_a_reference_means_changes_an_identity(
    data: Path,
    tmp_path: Path,
    before: Callable[[Path, Path], None],
    after: Callable[[Path, Path], None],
) -> None:
    def outcome(shared: MediaLoader) -> tuple[str, str]:
        try:
            return "digest", shared.fetch(MediaRef("image", "x.jpg"), shard="shards/1.jsonl").digest
        except SampleError as error:
            return "error", error.kind

    elsewhere = tmp_path / "outside"
    shared = loader(data, roots=[str(data), str(elsewhere)], max_bytes=50_000)
    before(data, elsewhere)
    looked, meant = looked_at(shared, "x.jpg"), outcome(shared)
    for path in (data / "shards" / "x.jpg", elsewhere / "x.jpg", elsewhere / "y.png"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            path.rmdir()
    after(data, elsewhere)
    if outcome(shared) != meant:
        assert identities_now(shared, looked) != looked


def test_a_replaced_target_of_a_link_to_another_root_is_noticed(data: Path, tmp_path: Path) -> None:
    make_link_to_another_root(data, tmp_path / "outside")
    shared = loader(data, roots=[str(data), str(tmp_path / "outside")])
    looked = looked_at(shared, "x.jpg")
    assert looked[-1] == (f"file://{data}/shards/x.jpg", looked[-1][1])
    (tmp_path / "outside" / "secret.png").write_bytes(JPEG)
    assert identities_now(shared, looked) != looked


def test_too_large_a_file_that_is_replaced_is_noticed(data: Path) -> None:
    make_too_large(data, data)
    shared = loader(data, max_bytes=50_000)
    looked = looked_at(shared, "x.jpg")
    make_file(data, data)
    assert identities_now(shared, looked) != looked
    assert load(data, "x.jpg", max_bytes=50_000) == JPEG


def test_identities_come_in_the_order_of_the_uris_over_all_roots(data: Path, tmp_path: Path) -> None:
    names = ["a.jpg", "nowhere.jpg", "shards/b.jpg", "shards/pics/c.jpg", "z.jpg"]
    uris = [f"file://{data}/{name}" for name in names]
    uris += [f"file://{tmp_path}/outside/secret.png", "file:///etc/passwd", "s3://bucket/x", "https://h/x"]
    # The outer root before and after the one in it: which of them answers makes no difference.
    for roots in ([data, data / "shards"], [data / "shards", data]):
        shared = loader(data, roots=[*map(str, roots), str(tmp_path / "outside"), "https://h/"])
        asked: list[str] = []
        told = list(shared.identities(asked.append(uri) or uri for uri in sorted(uris)))
        assert [uri for uri, _ in told] == asked == sorted(uris)
        now = dict(told)
        assert now["https://h/x"] == ""
        assert [uri for uri in uris if now[uri] is None] == [
            f"file://{data}/nowhere.jpg",
            f"file://{data}/z.jpg",
            "file:///etc/passwd",
            "s3://bucket/x",
        ]
    assert dict(loader(data).identities(["https://h/x"])) == {"https://h/x": None}


def test_identities_are_told_by_listing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[list[str]] = []
    stat_many = LocalStore.stat_many

    def noting(self: LocalStore, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        listed.append(list(names))
        return stat_many(self, listed[-1])

    monkeypatch.setattr(LocalStore, "stat_many", noting)
    monkeypatch.setattr(LocalStore, "stat", None)
    uris = [f"file://{data}/{name}" for name in ("a.jpg", "shards/b.jpg", "shards/pics/c.jpg")]
    assert None not in dict(loader(data).identities(uris)).values()
    assert listed == [["a.jpg", "shards/b.jpg", "shards/pics/c.jpg"]]


@pytest.mark.parametrize("answered", [0, 2])
def test_where_listing_is_denied_files_are_looked_up_one_by_one(
    data: Path, monkeypatch: pytest.MonkeyPatch, answered: int
) -> None:
    stat_many = LocalStore.stat_many

    def denying(self: LocalStore, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        for count, name in enumerate(names):
            if count == answered:
                raise PermissionError(errno.EACCES, "Access denied")
            yield from stat_many(self, [name])

    (data / "z").symlink_to("/etc/passwd")
    uris = [f"file://{data}/{name}" for name in ("a.jpg", "nowhere", "shards", "shards/b.jpg", "z")]
    expected = list(loader(data).identities(uris))
    monkeypatch.setattr(LocalStore, "stat_many", denying)
    assert list(loader(data).identities(uris)) == expected


def test_media_in_another_object_store() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    folder = f"memory://{uuid.uuid4().hex}"
    memory.pipe(f"{folder}/set/shards/b.jpg", JPEG)
    memory.pipe(f"{folder}/more/c.jpg", JPEG)
    roots = [f"{folder}/set", f"{folder}/more"]
    shared = MediaLoader(source_uri=f"{folder}/set", roots=roots, filesystem=lambda uri: memory)
    assert shared.remote
    looks = {ref: looked_at(shared, ref) for ref in ("b.jpg", "c.jpg", "nowhere.jpg", f"{folder}/more/c.jpg")}
    assert all(identities_now(shared, looked) == looked for looked in looks.values())
    assert [len(looked) for looked in looks.values()] == [1, 4, 4, 1]
    memory.pipe(f"{folder}/set/c.jpg", SECRET)
    assert [identities_now(shared, looked) == looked for looked in looks.values()] == [
        True,
        False,
        True,
        True,
    ]
    assert shared.fetch(MediaRef("image", "c.jpg"), shard="shards/1.jsonl").data == SECRET
    assert loader(Path("/nowhere")).remote is False


def test_over_http_identities_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: HttpFetcher, url: HttpUrl) -> bytes:
        if url.path == "/there.jpg":
            return JPEG
        raise SampleError("media_missing", f"{url} answered 404 Not Found.")

    monkeypatch.setattr(HttpFetcher, "fetch", fetch)
    shared = loader(Path("/nowhere"), roots=["/nowhere", "https://h/"])
    for ref, name in (("https://h/there.jpg", "there.jpg"), ("https://h/lost.jpg", "lost.jpg")):
        assert looked_at(shared, ref) == ((f"https://h/{name}", ""),)
    looked = looked_at(shared, "there.jpg")
    assert looked[-1] == ("https://h/there.jpg", "")
    assert {identity for _, identity in looked[:-1]} == {None}
    assert identities_now(shared, looked) == looked
