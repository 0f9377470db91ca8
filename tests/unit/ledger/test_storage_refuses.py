"""A storage that refuses to answer is no storage in which nothing is: to go on would be to pay again."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger import index_files
from airflow_vlm_provider.ledger.answers import Answers
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.records import to_line
from airflow_vlm_provider.ledger.segments import SegmentWriter
from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError
from airflow_vlm_provider.types import Answer, Choice
from tests.support.memory_files import MemoryFiles

KEY = "0" * 32
FOLDER = "_vlm/a.jsonl/caption/journal"


class Refusing(MemoryFiles):
    """Says what it is told to when names with a certain part are read."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, Exception] = {}

    def read(self, name: str, *, max_bytes: int) -> bytes:
        for part, error in self.refused.items():
            if part in name:
                raise error
        return super().read(name, max_bytes=max_bytes)


def answered(files: MemoryFiles, name: str, text: str) -> None:
    writer = SegmentWriter({})
    writer.add(to_line(KEY, Answer((Choice(text),), "m"), time=datetime.now(timezone.utc)))
    writer.save(files, f"{FOLDER}/{name}")
    writer.close()


async def in_thread(function: Any) -> Any:
    return await asyncio.to_thread(function)


def look_up(files: MemoryFiles) -> bytes | None:
    async def go() -> bytes | None:
        answers = Answers(destination=files, step="caption", in_thread=in_thread)
        try:
            await answers.open()
            return await answers.get(KEY)
        finally:
            await answers.close()

    return asyncio.run(go())


@pytest.fixture
def files() -> Refusing:
    files = Refusing()
    answered(files, "20260101T000000000000-00000000-0001.jsonl.zst", "here")
    KeyIndex(files, step="caption").add(f"{FOLDER}/20260101T000000000000-00000000-0001.jsonl.zst", [KEY])
    return files


@pytest.mark.parametrize("part", ["/keys/", "/journal/"])
@pytest.mark.parametrize("error", [StoreError("S3 refused the request"), ConnectionError("reset")])
def test_what_is_refused_is_not_taken_for_nothing(files, part, error):
    assert look_up(files) is not None
    files.refused[part] = error
    with pytest.raises((VLMError, OSError)) as raised:
        look_up(files)
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [ObjectChangedError("deleted while it was being read"), FileNotFoundError()]
)
def test_what_was_replaced_is_looked_for_in_its_journal(files, error):
    answered(files, "20260102T000000000000-00000000-0001.jsonl.zst", "newer")
    answered(files, "20260103T000000000000-00000000-0001.jsonl.zst", "newest")
    files.put(f"{FOLDER}/20260104T000000000000-00000000-0001.jsonl.zst", b"torn")
    files.refused["20260101T"] = error
    line = look_up(files)
    assert line is not None
    assert b"newest" in line


def test_while_a_replaced_segment_is_looked_for_a_storage_that_fails_is_an_error(files):
    answered(files, "20260102T000000000000-00000000-0001.jsonl.zst", "newer")
    files.refused = {"20260101T": FileNotFoundError(), "20260102T": ConnectionError("reset")}
    with pytest.raises(ConnectionError, match="reset"):
        look_up(files)


def test_a_file_of_the_index_that_vanishes_while_it_is_read_is_passed_over(files):
    files.refused["/keys/"] = ObjectChangedError("deleted while it was being read")
    assert look_up(files) is None


def test_a_file_that_is_too_large_for_an_index_is_left_out_and_told(files, monkeypatch, caplog):
    monkeypatch.setattr(index_files, "MAX_FILE_BYTES", 10)
    assert look_up(files) is None
    assert "which no file of it has" in caplog.text
