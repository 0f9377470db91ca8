from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import media_memory
from airflow_vlm_provider.ledger.media_memory import MediaMemory, MediaRecorder
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.types import Looked

PARAMETERS = {"max_pixels": None, "preprocessing": 1, "roots": ("s3://b/",)}
NAME = "_vlm/day/1.jsonl/tag/media.jsonl.zst"
CORRUPT = {"kind": "media_corrupt", "message": "It is cut short."}
MISSING = {"kind": "media_missing", "message": "It is nowhere."}


@pytest.fixture
def files(tmp_path: Path) -> LocalStore:
    return LocalStore(root=str(tmp_path))


def save(
    files: LocalStore, *lines: tuple[str, Looked, str | None, Mapping[str, str] | None]
) -> Callable[[], MediaMemory]:
    """Save a record of these lines; returns what reads it."""
    recorder = MediaRecorder(PARAMETERS)
    for ref, looked, digest, error in lines:
        recorder.add(ref, looked, digest=digest, error=error)
    assert recorder.save(files, "day/1.jsonl", "tag") == "media.jsonl.zst"
    recorder.close()
    return lambda: MediaMemory.read(files, NAME, PARAMETERS)


def found(ref: str, *places: tuple[str, str | None]) -> tuple[str, Looked, str, None]:
    return ref, places or ((f"s3://b/{ref}", f"id of {ref}"),), f"digest of {ref}", None


def telling(**now: str | None) -> Callable[[Iterable[str]], Iterator[tuple[str, str | None]]]:
    """Tell the identity of a URI by the last part of it; what is not given is as :func:`found` has it."""

    def identities(uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        before = ""
        for uri in uris:
            assert before < uri, "URIs are asked for in order, each once"
            before, name = uri, uri.rpartition("/")[2]
            yield uri, now.get(name, f"id of {name}")

    return identities


def test_what_has_not_changed_is_known_without_its_file(files: LocalStore) -> None:
    refs = ["b", "a", "c d", "\u00e9\u4e00", "x\udce9"]
    memory = save(files, *map(found, refs), ("lost", (("s3://b/lost", None),), None, MISSING))()
    assert memory.verify(telling(lost=None)) == 0
    for ref in refs:
        remembered = memory.recall(ref)
        assert remembered is not None
        assert (remembered.digest, remembered.error) == (f"digest of {ref}", None)
        assert remembered.looked == ((f"s3://b/{ref}", f"id of {ref}"),)
    lost = memory.recall("lost")
    assert lost is not None
    assert (lost.digest, lost.error) == (None, MISSING)
    assert memory.recall("never seen") is None


def test_nothing_is_known_before_it_was_compared_or_trusted(files: LocalStore) -> None:
    read = save(files, found("a"))
    memory = read()
    assert memory.recall("a") is None
    memory.trust()
    assert memory.recall("a") is not None
    memory.close()
    assert memory.recall("a") is None


def test_a_comparison_that_fails_lets_nothing_be_known(files: LocalStore) -> None:
    def identities(uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        yield next(iter(uris)), "id of a"
        raise ConnectionError("the store is gone")

    memory = save(files, found("a"), found("b"))()
    with pytest.raises(ConnectionError):
        memory.verify(identities)
    assert memory.recall("a") is None


@pytest.mark.parametrize(
    ("before", "now"), [("old", "new"), ("old", None), (None, "new"), (None, ""), ("", None), ("-", None)]
)
def test_what_was_replaced_deleted_or_put_there_is_noticed(
    files: LocalStore, before: str | None, now: str | None
) -> None:
    error = MISSING if before is None else None
    digest = None if before is None else "digest"
    read = save(files, ("x", (("s3://b/x", before),), digest, error), found("y"))
    memory = read()
    assert memory.verify(telling(x=now)) == 1
    assert memory.recall("x") is None
    assert memory.recall("y") is not None
    assert read().verify(telling(x=before)) == 0


def test_a_picture_that_appears_where_it_is_looked_for_first_is_noticed(files: LocalStore) -> None:
    read = save(files, found("x", ("s3://a/first", None), ("s3://b/second", "id of second")))
    assert read().verify(telling(first=None)) == 0
    memory = read()
    assert memory.verify(telling(first="new")) == 1
    assert memory.recall("x") is None


def test_all_references_to_a_replaced_picture_are_counted(files: LocalStore) -> None:
    place = ("s3://b/a", "id of a")
    memory = save(files, found("a", place), found("../b/a", place), found("s3://b/a", place), found("z"))()
    assert memory.verify(telling(a="new")) == 3
    assert [memory.recall(ref) for ref in ("a", "../b/a", "s3://b/a")] == [None] * 3


def test_a_picture_replaced_while_it_was_worked_on_counts_as_changed_and_is_known(files: LocalStore) -> None:
    old, new = ("x", (("s3://b/x", "old"),), "1", None), ("x", (("s3://b/x", "new"),), "2", None)
    memory = save(files, old, found("y"), new)()
    assert memory.verify(telling(x="new")) == 1
    remembered = memory.recall("x")
    assert remembered is not None
    assert remembered.digest == "2"


def test_places_are_told_in_order_and_once(files: LocalStore) -> None:
    place = ("s3://b/a", "1")
    lines = [
        found("z", ("s3://b/z", None), ("s3://b/a b", "2")),
        found("a", place),
        found("b", place),
        found("c", ("s3://b/a/", "3"), ("https://h/x", ""), ("s3://b/\ud800", None), ("s3://b/\uffff", None)),
    ]
    uris = list(save(files, *lines)().uris())
    assert uris == [
        ("https://h/x", ""),
        ("s3://b/a", "1"),
        ("s3://b/a b", "2"),
        ("s3://b/a/", "3"),
        ("s3://b/z", None),
        ("s3://b/\ud800", None),
        ("s3://b/\uffff", None),
    ]


@pytest.mark.parametrize(
    "identities",
    [
        lambda uris: ((uri, None) for uri in list(uris)[::-1]),
        lambda uris: ((uri, None) for uri in list(uris)[:-1]),
        lambda uris: iter(()),
    ],
)
def test_identities_that_are_told_wrongly_are_not_believed(files: LocalStore, identities: Any) -> None:
    memory = save(files, found("a"), found("b"))()
    with pytest.raises(RuntimeError):
        memory.verify(identities)
    assert memory.recall("a") is None


def test_what_may_pass_by_itself_and_what_the_shard_embeds_is_not_taken_down(files: LocalStore) -> None:
    recorder = MediaRecorder(PARAMETERS)
    recorder.add("a", (("s3://b/a", None),), error={"kind": "transient", "message": "A time-out."})
    recorder.add("b", (("s3://b/b", None),), error={"kind": "media_unreadable", "message": "Denied."})
    recorder.add("c", (), digest="embedded")
    recorder.add("d", (), error=CORRUPT)
    recorder.add("e", (("s3://b/e", "id"),))
    assert recorder.count == 0
    assert recorder.save(files, "day/1.jsonl", "tag") is None
    with pytest.raises(FileNotFoundError):
        files.stat(NAME)


def test_an_error_is_tried_again_where_nothing_tells_whether_it_lasts(files: LocalStore) -> None:
    lines = [
        ("broken", (("https://h/broken", ""),), None, CORRUPT),
        found("whole", ("s3://b/whole", None), ("https://h/whole", "")),
    ]
    read = save(files, *lines)
    memory = read()
    assert memory.verify(lambda uris: ((uri, "" if uri[0] == "h" else None) for uri in uris)) == 0
    assert memory.recall("broken") is None
    assert memory.recall("whole") is not None
    memory = read()
    memory.trust()
    remembered = memory.recall("broken")
    assert remembered is not None
    assert remembered.error == CORRUPT


@pytest.mark.parametrize("other", [{"max_pixels": 1000}, {"roots": ["s3://b/", "s3://c/"]}, {"more": 1}])
def test_under_other_parameters_nothing_is_known(
    files: LocalStore, caplog: pytest.LogCaptureFixture, other: Mapping[str, Any]
) -> None:
    save(files, found("a"), ("b", (("s3://b/b", "id of b"),), None, CORRUPT))
    memory = MediaMemory.read(files, NAME, {**PARAMETERS, **other})
    assert memory.verify(telling()) == 1
    memory.trust()
    assert memory.recall("a") is None
    assert memory.recall("b") is None
    assert "roots" in caplog.text


def test_an_empty_memory_knows_nothing_and_nothing_of_it_has_changed() -> None:
    memory = MediaMemory.empty()
    assert memory.verify(telling()) == 0
    assert list(memory.uris()) == []
    assert memory.recall("a") is None
    memory.close()


def test_the_record_is_read_with_standard_tools(files: LocalStore, tmp_path: Path) -> None:
    save(files, found("a"), found("a"), ("b", (("s3://b/b", "id"),), None, CORRUPT))
    with zstandard.open(tmp_path / NAME, "rt") as stream:
        header, *lines, end = map(json.loads, stream)
    assert header == {
        "format": "vlm-media",
        "version": 1,
        "parameters": {**PARAMETERS, "roots": ["s3://b/"]},
    }
    assert lines == [
        {"ref": "a", "looked": [["s3://b/a", "id of a"]], "digest": "digest of a", "error": None},
        {"ref": "b", "looked": [["s3://b/b", "id"]], "digest": None, "error": CORRUPT},
    ]
    assert end == {"count": 2}


def test_a_later_commit_replaces_the_record(files: LocalStore) -> None:
    save(files, found("a"), found("b"))
    memory = save(files, found("c"))()
    assert [uri for uri, _ in memory.uris()] == ["s3://b/c"]


def rewritten(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Write a record anew with other lines, compressed as it should be."""
    lines = (
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).splitlines(keepends=True)
    )
    path.write_bytes(zstandard.compress(b"".join(change(lines))))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no Zstandard at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: rewritten(path, lambda lines: lines[:-1]),
        lambda path: rewritten(path, lambda lines: [*lines[:1], *lines[2:]]),
        lambda path: rewritten(path, lambda lines: lines[1:]),
        lambda path: rewritten(path, lambda lines: [*lines, lines[1]]),
        lambda path: rewritten(path, lambda lines: [*lines[:2], b"{}\n", *lines[3:]]),
        lambda path: rewritten(path, lambda lines: [*lines[:2], b"[]\n", *lines[3:]]),
        lambda path: rewritten(
            path, lambda lines: [lines[0].replace(b'"version":1', b'"version":2'), *lines[1:]]
        ),
        lambda path: rewritten(path, lambda lines: [b'{"format":"other","version":1}\n', *lines[1:]]),
        lambda path: rewritten(path, lambda lines: [line[: len(line) // 2] for line in lines]),
    ],
)
def test_a_damaged_record_is_ignored_and_reported(
    files: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    read = save(files, found("a"), found("b"), found("c"))
    damage(tmp_path / NAME)
    with caplog.at_level(logging.WARNING):
        memory = read()
    assert NAME in caplog.text
    assert memory.verify(telling()) == 1, "what is not known counts as changed"
    memory.trust()
    assert memory.recall("a") is None
    assert list(memory.uris()) == []


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), count=st.integers(1, 400))
def test_a_torn_record_is_never_taken_for_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, share: float, count: int
) -> None:
    root = tmp_path_factory.mktemp("torn")
    read = save(LocalStore(root=str(root)), *(found(f"{number * 7919}") for number in range(count)))
    whole = (root / NAME).read_bytes()
    (root / NAME).write_bytes(whole[: int(len(whole) * share)])
    memory = read()
    assert memory.verify(telling()) == 1
    assert list(memory.uris()) == []


def test_a_store_that_can_not_be_reached_is_no_damaged_record() -> None:
    class Gone(LocalStore):
        def open(self, name: str) -> Any:
            raise ConnectionError("the store is gone")

    with pytest.raises(ConnectionError):
        MediaMemory.read(Gone(root="/nowhere"), NAME, PARAMETERS)


def test_a_record_that_can_not_be_saved_leaves_the_old_one(files: LocalStore) -> None:
    read = save(files, found("a"))

    class Full(LocalStore):
        def create(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    recorder = MediaRecorder(PARAMETERS)
    recorder.add(*found("b"))
    with pytest.raises(OSError, match="No space"):
        recorder.save(Full(root="/nowhere"), "day/1.jsonl", "tag")
    recorder.close()
    recorder.close()
    assert [uri for uri, _ in read().uris()] == ["s3://b/a"]


def test_a_repeated_reference_is_taken_down_once_unless_it_means_something_else() -> None:
    recorder = MediaRecorder(PARAMETERS)
    for _ in range(3):
        for number in range(1000):
            recorder.add(*found(str(number)))
    assert recorder.count == 1000
    recorder.add("1", (("s3://b/1", "another"),), digest="another")
    recorder.add("1", (("s3://b/1", "another"),), error=CORRUPT)
    assert recorder.count == 1002


def test_only_so_many_recent_references_are_kept_in_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_memory, "RECENT", 10)
    recorder = MediaRecorder(PARAMETERS)
    for number in [*range(10), *range(10), *range(10, 30), 29, 0]:
        recorder.add(*found(str(number)))
    assert recorder.count == 31


def test_memory_does_not_grow_with_the_shard(files: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_memory, "RECENT", 1000)
    many, random = 15_000, Random(1)
    tracemalloc.start()
    try:
        recorder = MediaRecorder(PARAMETERS)
        for _ in range(many):
            name = random.randbytes(150).hex()
            recorder.add(name, ((f"s3://b/{name}", "old"),), digest=random.randbytes(32).hex())
        recorder.save(files, "day/1.jsonl", "tag")
        recorder.close()
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        memory = MediaMemory.read(files, NAME, PARAMETERS)
        assert memory.verify(lambda uris: ((uri, "new") for uri in uris)) == many
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = many * (300 + 300 + 64)
    assert written < held / 3
    assert read < held / 3
