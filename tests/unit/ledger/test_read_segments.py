from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.ledger.read_segments import ReadSegments


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


def line(number: int, text: str = "") -> bytes:
    return b'{"key":"%b","text":"%b"}' % (key(number).hex().encode(), text.encode())


BATCHES = st.lists(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=5)), max_size=5), max_size=4)


@given(st.dictionaries(st.sampled_from("abc"), BATCHES))
def test_every_line_is_found_in_its_segment_and_nowhere_else(segments):
    read, models = ReadSegments(), {}
    for name, batches in segments.items():
        lines = [[line(*each) for each in batch] for batch in batches]
        read.add(name, lines)
        models[name] = {number: line(number, text) for batch in batches for number, text in batch}
    for name in "abc":
        assert (name in read) == (name in segments)
        for number in range(10):
            kept = read.get(name, key(number))
            if number not in models.get(name, {}):
                assert kept is None
            else:
                assert kept == models[name][number]
    assert len(read) == sum(len(batch) for batches in segments.values() for batch in batches)
    read.close()


def test_a_segment_that_breaks_off_is_not_there_and_the_others_are():
    def torn():
        yield [line(1)]
        raise ValueError("torn")

    read = ReadSegments()
    with pytest.raises(ValueError, match="torn"):
        read.add("torn", torn())
    read.add("whole", [[line(1, "whole")]])
    assert "torn" not in read
    assert read.get("torn", key(1)) is None
    assert read.get("whole", key(1)) == line(1, "whole")
    read.close()
    read.close()


def test_threads_share_it():
    read, started = ReadSegments(), threading.Barrier(8)

    def work(thread: int) -> None:
        started.wait()
        for segment in range(30):
            name, numbers = (thread, segment), range(segment * 100, segment * 100 + 20)
            read.add(name, ([line(number, f"{thread}")] for number in numbers))
            for number in numbers:
                assert read.get(name, key(number)) == line(number, f"{thread}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(read) == 8 * 30 * 20
    read.close()


def run(code: str, tmp: str) -> str:
    code = "import os, resource, signal\nfrom airflow_vlm_provider.ledger.read_segments import *\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": tmp},
        check=False,
    )
    return done.stdout.strip()


def test_a_process_that_is_killed_leaves_no_file_behind(tmp_path):
    code = """
read = ReadSegments()
read.add(0, [[b'{"key":"' + b'0' * 32 + b'"' + bytes(10**6)]])
print(os.readlink(f"/proc/self/fd/{read._file.fileno()}"), os.fstat(read._file.fileno()).st_size, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    name, size = run(code, str(tmp_path)).replace(" (deleted)", "").split()
    assert name.startswith(str(tmp_path))
    assert int(size) > 10**6
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_remedy(tmp_path):
    code = """
read = ReadSegments()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    read.add(0, [[b'{"key":"' + b'0' * 32 + b'"' + bytes(2000)]])
except OSError as error:
    print(error)
print(0 in read)
read.close()
print("closed")
"""
    message, there, closed = run(code, str(tmp_path)).splitlines()
    assert f"Free space in {tmp_path}, or name another directory in TMPDIR" in message
    assert (there, closed) == ("False", "closed")
