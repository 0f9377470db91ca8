"""What is in an index of keys, and what is left out because it is damaged or unknown."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from airflow_vlm_provider.ledger import index_files
from airflow_vlm_provider.ledger.key_index import KeyIndex, KeyTable
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.key_indexes import FOLDER, index, key, loaded, segment
from tests.support.memory_files import MemoryFiles


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
