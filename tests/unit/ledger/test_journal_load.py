"""What a run finds in the journal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from airflow_vlm_provider.ledger import journal as journal_module
from airflow_vlm_provider.ledger import segments
from airflow_vlm_provider.ledger.segments import read_segment
from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError
from tests.support.journals import (
    FOLDER,
    NOON,
    commit,
    loaded,
    names,
    records,
    reuse,
    stored,
    written,
)
from tests.support.memory_files import MemoryFiles


def torn_kinds(data: bytes) -> dict[str, bytes]:
    return {"cut": data[:-3], "empty": b"", "garbage": b"\0garbage", "half": data[: len(data) // 2]}


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "half"])
def test_a_torn_segment_is_told_and_left_out_and_left_alone(kind, caplog):
    files, lines = MemoryFiles(), records(8)
    written(files, lines[:4], committed=False)
    (torn,) = names(files)
    files.files[f"{FOLDER}/{torn}"] = torn_kinds(files.files[f"{FOLDER}/{torn}"])[kind]
    written(files, lines[4:], committed=False)

    async def go() -> tuple[list[bytes], list[str]]:
        made, found = await loaded(files)
        for line in found:
            made.use(line)
        await made.append(lines[0])
        await commit(made, files)
        return found, made.torn

    found, told = asyncio.run(go())
    assert sorted(found) == sorted(lines[4:])
    assert told == [torn]
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert torn in caplog.text
    assert torn in names(files)
    assert stored(files) == sorted([lines[0], *lines[4:]])


def test_what_a_newer_version_wrote_is_left_out_and_never_deleted(monkeypatch, caplog):
    files = MemoryFiles()
    monkeypatch.setattr(segments, "VERSION", 2)
    written(files, records(2))
    monkeypatch.setattr(segments, "VERSION", 1)
    (newer_one,) = names(files)
    assert stored(files) == []
    assert "upgrade" in caplog.text
    asyncio.run(reuse(files, [], records(2)))
    assert newer_one in names(files)


def test_other_files_in_the_folder_are_nobodys_business(caplog):
    files = MemoryFiles()
    written(files, records(2))
    files.put(f"{FOLDER}/journal/README.txt", b"mine")
    files.put(f"{FOLDER}/journal/old.jsonl.zst", b"mine")
    assert stored(files) == sorted(records(2))
    assert caplog.records == []


def test_a_file_too_large_for_a_segment_is_not_even_read(monkeypatch):
    files = MemoryFiles()
    written(files, records(2))
    (name,) = names(files)
    monkeypatch.setattr(journal_module, "MAX_FILE_BYTES", 10)
    files.broken.add(f"{FOLDER}/{name}")

    async def go() -> list[str]:
        made, lines = await loaded(files)
        assert lines == []
        return made.torn

    assert asyncio.run(go()) == [name]


def test_one_read_a_segment_and_a_few_at_a_time():
    files, lines = MemoryFiles(), records(60)
    written(files, lines, answers=8, committed=False)
    count = len(names(files))
    assert count > 2 * journal_module.READERS
    reads, now, most = [], [0], [0]

    async def in_thread(function: Callable[[], Any]) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        for _ in range(5):
            await asyncio.sleep(0)
        now[0] -= 1
        return function()

    class Counted(MemoryFiles):
        def read(self, name: str, *, max_bytes: int) -> bytes:
            reads.append(name)
            return super().read(name, max_bytes=max_bytes)

    counted = Counted()
    counted.files, counted.modified = files.files, files.modified
    _, found = asyncio.run(loaded(counted, in_thread=in_thread))
    assert sorted(found) == sorted(lines)
    assert len(reads) == len(set(reads)) == count
    assert most[0] == journal_module.READERS


class Vanishing(MemoryFiles):
    """Before a segment is read, another attempt puts it all into a new one and deletes it.

    :param error: What the storage says of a segment that is gone.
    """

    def __init__(self, error: type[Exception], times: int) -> None:
        super().__init__()
        self.error = error
        self.times = times

    def read(self, name: str, *, max_bytes: int) -> bytes:
        if "/journal/" in name and self.times:
            self.times -= 1
            there = {each: self.files[f"{FOLDER}/{each}"] for each in names(self)}
            lines = [line for data in there.values() for line in read_segment(data)]
            other = MemoryFiles()
            written(other, lines)
            for each in there:
                super().delete(f"{FOLDER}/{each}")
            self.files.update(other.files)
            self.modified.update(other.modified)
            raise self.error(name)
        return super().read(name, max_bytes=max_bytes)


@pytest.mark.parametrize("error", [FileNotFoundError, ObjectChangedError])
@pytest.mark.parametrize("times", [1, 2])
def test_a_segment_that_another_attempt_replaces_is_found_in_its_new_place(error, times, caplog):
    files, lines = Vanishing(error, 0), records(20)
    written(files, lines, answers=8, committed=False)
    files.times = times

    # In threads: the other attempt has an event loop of its own.
    made, found = asyncio.run(loaded(files, in_thread=asyncio.to_thread))
    assert set(found) == set(lines)
    assert made.torn == []
    assert caplog.records == []
    assert set(stored(files)) == set(lines)


def test_a_torn_segment_is_told_once_though_the_journal_is_listed_again(caplog):
    class Late(MemoryFiles):
        """Says of each segment once that it is not there."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: set[str] = set()

        def read(self, name: str, *, max_bytes: int) -> bytes:
            if name != torn and name not in self.asked:
                self.asked.add(name)
                raise FileNotFoundError(name)
            return super().read(name, max_bytes=max_bytes)

    files, lines, torn = Late(), records(20), f"{FOLDER}/{segments.segment_name(NOON, '00000000', 1)}"
    files.put(torn, b"garbage")
    written(files, lines, answers=8, committed=False)
    made, found = asyncio.run(loaded(files))
    assert set(found) == set(lines)
    assert len(made.torn) == len(caplog.records) == 1


def test_a_listing_that_stays_stale_is_told_and_not_fatal(caplog, monkeypatch):
    monkeypatch.setattr(journal_module, "LISTING_PAUSE_SECONDS", 0.0)
    files, lines = MemoryFiles(), records(8)
    written(files, lines[:4], committed=False)
    (gone,) = names(files)
    written(files, lines[4:], committed=False)
    listed = list(files.list(f"{FOLDER}/journal"))
    files.delete(f"{FOLDER}/{gone}")
    files.list = lambda folder="": iter(listed)  # type: ignore[method-assign]
    made, found = asyncio.run(loaded(files))
    assert sorted(found) == sorted(lines[4:])
    assert "were listed and not there" in caplog.text
    assert made.torn == []


@pytest.mark.parametrize("error", [ConnectionError("away"), PermissionError("denied"), StoreError("500")])
def test_a_store_that_can_not_be_read_is_an_error_and_not_an_empty_journal(error):
    """Otherwise everything would be paid for again."""

    class Away(MemoryFiles):
        def read(self, name: str, *, max_bytes: int) -> bytes:
            raise error

    files = MemoryFiles()
    written(files, records(2))
    away = Away()
    away.files, away.modified = files.files, files.modified
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(loaded(away))
