from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import key_value_file
from airflow_vlm_provider.ledger.key_value_file import KeyValueFile

KEYS = st.binary(max_size=3)
VALUES = st.binary(max_size=8)
# Rows are written one by one, a few at a time, or not before the end.
WAITING = st.sampled_from([1, 3, key_value_file.WAITING_ROWS])
BATCHES = st.lists(st.lists(st.tuples(KEYS, VALUES), max_size=6), max_size=8)

# More than the cache holds, so that the file is really there.
SPILL = """
import os, resource, sys
from airflow_vlm_provider.ledger.key_value_file import KeyValueFile

def peak():
    # Not ru_maxrss, which begins with what the process that started this one had.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

table = KeyValueFile()
table.put_many((b"%08d" % n, b"v" * 400) for n in range(1000))
before = peak()
table.put_many((os.urandom(16), os.urandom(400)) for n in range(200_000))
grown = peak() - before
"""


def run(code: str, tmp: Path, *, kill: bool = False) -> str:
    """Run code after SPILL, with temporary files in a directory of its own; return what it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPILL + code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp), "SQLITE_TMPDIR": str(tmp)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if kill:
            process.send_signal(signal.SIGKILL)
        status = process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert status == (-signal.SIGKILL if kill else 0)
    return line.strip()


@given(BATCHES, WAITING)
def test_it_holds_what_a_dict_would(batches, waiting):
    with mock.patch.object(key_value_file, "WAITING_ROWS", waiting):
        table, model = KeyValueFile(), {}
        for batch in batches:
            table.put_many(batch)
            model.update(batch)
            for key in {key for batch in batches for key, _ in batch} | {b"?"}:
                assert table.get(key) == model.get(key)
        assert len(table) == len(model)
        assert list(table.items_sorted()) == sorted(model.items())
        table.close()


@given(BATCHES, WAITING)
def test_of_several_values_it_keeps_the_chosen_one(batches, waiting):
    with mock.patch.object(key_value_file, "WAITING_ROWS", waiting):
        table, model = KeyValueFile(choose=max), {}
        for batch in batches:
            table.put_many(batch)
            for key, value in batch:
                model[key] = max(value, model.get(key, value))
            assert {key: table.get(key) for key in model} == model
        assert list(table.items_sorted()) == sorted(model.items())
        table.close()


@pytest.mark.parametrize(
    ("bound", "size"), [("WAITING_ROWS", 1), ("WAITING_BYTES", key_value_file.WAITING_BYTES // 20)]
)
def test_what_waits_in_memory_is_bounded(bound, size):
    table = KeyValueFile()
    waiting = []
    for number in range(3 * key_value_file.WAITING_ROWS):
        table.put_many([(b"%d" % number, bytes(size))])
        waiting.append(len(table._waiting))
    assert waiting[-1] < len(waiting) // 2
    assert max(waiting) == (key_value_file.WAITING_ROWS - 1 if bound == "WAITING_ROWS" else 19)
    assert table.get(b"0") == table.get(b"%d" % number) == bytes(size)
    table.close()


def test_keys_that_share_a_hash_are_told_apart():
    with mock.patch.object(key_value_file, "HASHES", 8):
        table = KeyValueFile()
        table.put_many((b"%d" % number, b"value of %d" % number) for number in range(100))
        assert [table.get(b"%d" % number) for number in range(100)] == [
            b"value of %d" % number for number in range(100)
        ]
        assert table.get(b"100") is None
        table.close()


def test_a_look_for_what_is_not_there_mostly_does_without_the_database():
    table = KeyValueFile()
    table.put_many((b"%d" % number, b"") for number in range(2 * key_value_file.WAITING_ROWS))
    with mock.patch.object(table, "_turn", side_effect=table._turn) as turn:
        assert [table.get(b"other %d" % number) for number in range(1000)] == [None] * 1000
        assert turn.call_count < 100
        assert table.get(b"7") == b""
    table.close()


@settings(max_examples=10)
@given(st.integers(0, 3 * key_value_file.TURN_ROWS))
def test_nothing_is_lost_between_one_turn_and_the_next(count):
    table = KeyValueFile()
    rows = [(number.to_bytes(2, "big"), b"%d" % number) for number in range(count)]
    table.put_many(iter(reversed(rows)))
    assert list(table.items_sorted()) == rows
    table.close()


def test_threads_share_it():
    table = KeyValueFile()
    started = threading.Barrier(8)

    def work(thread: int) -> None:
        started.wait()
        for number in range(300):
            key = b"%d-%d" % (thread, number)
            table.put_many([(key, key), (b"shared", key)])
            assert table.get(key) == key
            assert table.get(b"shared") is not None

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(table) == 8 * 300 + 1
    assert dict(table.items_sorted())[b"7-299"] == b"7-299"
    table.close()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    grown = int(run("print(grown, flush=True)", tmp_path))
    # 200,000 rows are 83 MB of keys and values alone.
    assert grown < 20


@pytest.mark.parametrize("kill", [False, True])
def test_no_file_is_left_behind(tmp_path, kill):
    code = """
names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and
         os.path.islink(f"/proc/self/fd/{fd}")]
print(sum(os.environ["TMPDIR"] in name for name in names), flush=True)
""" + ("import time\ntime.sleep(60)" if kill else "")
    assert run(code, tmp_path, kill=kill) == "1"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_remedy(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    KeyValueFile().put_many((os.urandom(16), bytes(4000)) for n in range(10_000))
except OSError as error:
    print(error, flush=True)
"""
    message = run(code, tmp_path)
    assert "TMPDIR" in message
    assert "Free space" in message


def test_closing_it_twice_is_no_error_and_leaves_it_closed():
    table = KeyValueFile()
    table.put_many([(b"key", b"value")])
    assert len(table) == 1
    table.close()
    table.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        len(table)
