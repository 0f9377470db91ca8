from __future__ import annotations

import hashlib
import json
import tracemalloc
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import segments
from airflow_vlm_provider.ledger.records import to_line
from airflow_vlm_provider.ledger.segments import (
    SegmentWriter,
    TornSegmentError,
    is_segment,
    iter_segment,
    read_segment,
    segment_name,
)
from airflow_vlm_provider.types import Answer, Choice
from tests.support.memory_files import MemoryFiles

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
HEADER = {"shard": "a/b.jsonl", "step": "s", "created": "2026-01-01", "written_by": {"dag_id": "d"}}


def record(number: int, text: str = "a cat") -> bytes:
    key = hashlib.sha256(str(number).encode()).hexdigest()[:32]
    return to_line(key, Answer((Choice(text),), "m"), time=NOON + timedelta(seconds=number))


def segment(lines: list[bytes], header: Any = HEADER) -> bytes:
    files, writer = MemoryFiles(), SegmentWriter(header)
    for line in lines:
        writer.add(line)
    writer.save(files, "x")
    writer.close()
    return files.files["x"]


def compressed(*lines: bytes, end: bytes = b"\n") -> bytes:
    """A frame of any content, with a checksum that is right."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join(lines) + end)


LINES = [record(number) for number in range(5)]
WHOLE = segment(LINES)
FIRST = b'{"format":"vlm-journal","version":1}'


@given(st.lists(st.builds(record, st.integers(0, 99), st.text(max_size=50)), max_size=60))
@settings(max_examples=50)
def test_lines_come_back_as_they_were_added(lines):
    data = segment(lines)
    assert read_segment(data) == lines
    assert [line for batch in iter_segment(data) for line in batch] == lines


def test_many_lines_come_in_parts_and_of_them_none_is_lost_or_doubled():
    lines = [record(number, "x" * (number % 700)) for number in range(5000)]
    lines[2500] = record(2500, "long" * 300_000)
    data = segment(lines)
    batches = list(iter_segment(data))
    assert len(batches) > 3
    assert [line for batch in batches for line in batch] == lines == read_segment(data)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 3000])
def test_the_end_is_no_record_wherever_a_part_ends(count):
    # So alike that they unfold in one piece.
    lines = LINES[:1] * count
    assert read_segment(segment(lines)) == lines


def test_a_segment_is_read_by_tools_that_know_zstandard_and_json_lines():
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(WHOLE), "zstd") as stream:
        objects = [json.loads(line) for line in stream.read().splitlines()]
    assert objects[0] == {"format": "vlm-journal", "version": 1, **HEADER}
    assert [each["key"] for each in objects[1:-1]] == [line[8:40].decode() for line in LINES]
    assert objects[-1] == {"end": True, "records": 5}


def test_a_frame_has_a_checksum_and_the_same_lines_make_the_same_bytes():
    assert zstandard.get_frame_parameters(WHOLE).has_checksum
    assert segment(LINES) == WHOLE
    assert segment(LINES, {**HEADER, "step": "t"}) != WHOLE


def test_cut_off_after_any_byte_it_is_torn():
    for end in range(len(WHOLE)):
        with pytest.raises(TornSegmentError, match=r"cut off|empty"):
            read_segment(WHOLE[:end])


def test_with_any_bit_turned_it_is_torn_or_as_it_was():
    for position in range(len(WHOLE)):
        for bit in range(8):
            damaged = bytearray(WHOLE)
            damaged[position] ^= 1 << bit
            # Some bits of the frame's header mean nothing for what is in it.
            with suppress(TornSegmentError):
                assert read_segment(bytes(damaged)) == LINES, f"bit {bit} of byte {position}"


@pytest.mark.parametrize("more", [b"\0", b"x", WHOLE, WHOLE[:10]])
def test_what_follows_the_end_makes_it_torn(more):
    with pytest.raises(TornSegmentError, match="follows its end"):
        read_segment(WHOLE + more)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"garbage, and no frame at all", "not what was written"),
        (compressed(end=b""), "no header"),
        (compressed(b""), "not the header"),
        (compressed(b"{}"), "not the header"),
        (compressed(b"[" * 100_000), "not the header"),
        (compressed(b'{"format":"other","version":1}'), "not the header"),
        (compressed(b'{"format":"vlm-journal","version":2}'), "newer"),
        (compressed(FIRST), "no end"),
        (compressed(FIRST, LINES[0]), "holds 0 records, and does not end"),
        (compressed(FIRST, LINES[0], b'{"end":true,"records":2}'), "holds 1 records, and does not end"),
        (compressed(FIRST, LINES[0], b'{"end":false,"records":1}'), "does not end"),
        (compressed(FIRST, LINES[0], b'{"end":true,"records":1}', end=b""), "no end"),
        (compressed(FIRST, b'{"end":true,"records":0}', LINES[0]), "record 1"),
        (compressed(FIRST, LINES[0], b"{}", LINES[1], b'{"end":true,"records":3}'), "record 2"),
        (compressed(FIRST, *LINES * 500, b"{}", b'{"end":true,"records":2501}'), "record 2501"),
    ],
)
def test_what_is_no_whole_segment_is_told_as_such(data, why):
    with pytest.raises(TornSegmentError, match=why):
        read_segment(data)


def test_of_a_torn_segment_not_even_a_part_is_handed_out():
    data = compressed(FIRST, *LINES * 2000, b'{"end":true,"records":9999}')
    with pytest.raises(TornSegmentError):
        next(iter_segment(data))


def test_a_decompression_bomb_is_refused_before_it_unfolds(monkeypatch):
    monkeypatch.setattr(segments, "MAX_CONTENT_BYTES", 1024 * 1024)
    bomb = compressed(FIRST, *[b"x" * 1000] * 100_000)
    assert len(bomb) < 100_000
    with pytest.raises(TornSegmentError, match="more than 1048576 bytes"):
        # A line that never ends, too, and one that is none of a journal's.
        read_segment(bomb.replace(b"\n", b"x"))


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(segments, "MAX_LINE_BYTES", 100_000)
    with pytest.raises(TornSegmentError, match="a line of more than"):
        read_segment(compressed(FIRST, Random(1).randbytes(1_000_000).hex().encode()))


@pytest.mark.parametrize("line", [b"", b"{}", LINES[0] + b"\n", LINES[0] + b"\n" + LINES[1], b" " + LINES[0]])
def test_what_is_no_line_is_not_taken(line):
    with pytest.raises(ValueError, match="can't be a line"):
        SegmentWriter(HEADER).add(line)


def test_no_line_is_written_that_is_too_long_to_be_read(monkeypatch):
    monkeypatch.setattr(segments, "MAX_LINE_BYTES", 1000)
    writer = SegmentWriter(HEADER)
    with pytest.raises(ValueError, match="can't be a line"):
        writer.add(record(1, "x" * 1000))
    assert writer.count == 0


def test_saving_can_be_tried_again_after_an_error():
    class Away(MemoryFiles):
        def create(self, name):
            raise ConnectionError("away")

    writer, files = SegmentWriter(HEADER), MemoryFiles()
    for line in LINES:
        writer.add(line)
    with pytest.raises(ConnectionError):
        writer.save(Away(), "x")
    writer.save(files, "x")
    assert files.files["x"] == WHOLE


def test_a_writer_says_when_it_is_full_before_it_is_too_large_to_be_read(monkeypatch):
    monkeypatch.setattr(segments, "FULL_BYTES", 1000)
    writer = SegmentWriter(HEADER)
    assert not writer.full
    for line in LINES * 2:
        writer.add(line)
    assert writer.full
    assert writer.count == 10
    assert segments.MAX_CONTENT_BYTES > 128 * 1024 * 1024 + 2 * segments.MAX_LINE_BYTES


def test_what_is_collected_is_not_kept_in_memory():
    writer, files, numbers = SegmentWriter(HEADER), MemoryFiles(), Random(1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2000):
            writer.add(record(number, numbers.randbytes(4000).hex()))
        held = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    writer.save(files, "x")
    writer.close()
    assert len(files.files["x"]) > 8_000_000
    assert held < 4_000_000


moments = st.datetimes(
    min_value=datetime(1990, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(timezone.utc)
)


@given(st.lists(moments, unique=True, min_size=2, max_size=5), st.booleans())
def test_names_sort_by_time_and_are_known_as_segments(times, consolidated):
    names = [segment_name(time, "0a1b2c3d", 7, consolidated=consolidated) for time in times]
    assert sorted(names) == [
        segment_name(time, "0a1b2c3d", 7, consolidated=consolidated) for time in sorted(times)
    ]
    assert all(map(is_segment, names))
    assert all(name.endswith("-all.jsonl.zst") == consolidated for name in names)


def test_a_name_says_when_in_utc_by_whom_and_which():
    time = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=1)))
    assert segment_name(time, "0a1b2c3d", 7) == "journal/20260102T020405000678-0a1b2c3d-0007.jsonl.zst"


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "journal/readme.jsonl.zst",
        "journal/20260102T020405000678-0a1b2c3d-0007.jsonl",
        "x/journal/20260102T020405000678-0a1b2c3d-0007.jsonl.zst",
        "journal/20260102T020405000678-0a1b2c3d-0007.jsonl.zst\n",
    ],
)
def test_other_files_are_no_segments(name):
    assert not is_segment(name)
