from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.formats import RowKeys, is_shard, shard_format, shard_stem
from airflow_vlm_provider.shards.jsonl import MAX_DEPTH, JsonLines, JsonLinesWriter
from airflow_vlm_provider.types import Sample

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SUFFIXES = [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst"]

# Lone surrogates included: JSON can hold them, UTF-8 cannot.
texts = st.text(st.characters(codec=None), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
rows = st.dictionaries(texts, values, max_size=5)


def samples_of(stream: BinaryIO, name: str = "a.jsonl", form: JsonLines | None = None) -> Iterator[Sample]:
    with (form or shard_format(name)).open(stream, keys=RowKeys()) as reader:
        yield from reader


def read(data: bytes, form: JsonLines | None = None) -> list[Sample]:
    return list(samples_of(io.BytesIO(data), form=form))


@contextlib.contextmanager
def writing(stream: BinaryIO, name: str = "a.jsonl") -> Iterator[JsonLinesWriter]:
    with (
        shard_format(name).open(io.BytesIO(), keys=RowKeys()) as reader,
        reader.writer(stream, generated={}) as writer,
    ):
        assert isinstance(writer, JsonLinesWriter)
        yield writer


def write(name: str, *rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    with writing(stream, name) as writer:
        for index, row in enumerate(rows):
            writer.write(Sample(index=index, line=index + 1, row={}), [row])
    return stream.getvalue()


@pytest.mark.parametrize("suffix", SUFFIXES)
@untimed
@given(written=st.lists(rows, max_size=5))
def test_rows_come_back_as_they_were_written(suffix: str, written: list[dict[str, Any]]) -> None:
    stream = io.BytesIO(write("shard" + suffix, *written))
    samples = list(samples_of(stream, "shard" + suffix))
    assert [sample.row for sample in samples] == written
    assert [sample.index for sample in samples] == list(range(len(written)))


@untimed
@given(written=st.lists(rows, max_size=5))
def test_untouched_rows_keep_their_bytes(written: list[dict[str, Any]]) -> None:
    original = write("a.jsonl", *written)
    copy = io.BytesIO()
    with writing(copy) as writer:
        for sample in read(original):
            writer.write_unchanged(sample)
    assert copy.getvalue() == original


def test_spacing_escapes_and_number_texts_of_an_untouched_row_survive() -> None:
    raw = rb'{ "a":1.10,  "b" : "\u00e9\/", "c":1E2, "c":2}'
    (sample,) = read(raw + b"\n")
    stream = io.BytesIO()
    with writing(stream) as writer:
        writer.write_unchanged(sample)
    assert stream.getvalue() == raw + b"\n"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_shard_has_no_rows(suffix: str) -> None:
    empty = write("a" + suffix)
    assert list(samples_of(io.BytesIO(empty), "a" + suffix)) == []


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        pytest.param(b'{"a":1}\n{"a":2}', [1, 2], id="no trailing newline"),
        pytest.param(b'{"a":1}\r\n{"a":2}\r\n', [1, 2], id="CRLF"),
        pytest.param(b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [1, 2], id="byte order mark"),
        pytest.param(b'\n{"a":1}\n\n \t\r\n{"a":2}\n\n', [2, 5], id="blank lines"),
    ],
)
def test_line_ends_marks_and_blank_lines_are_no_part_of_rows(data: bytes, lines: list[int]) -> None:
    samples = read(data)
    assert [sample.raw for sample in samples] == [b'{"a":1}', b'{"a":2}']
    assert [sample.row for sample in samples] == [{"a": 1}, {"a": 2}]
    assert [sample.index for sample in samples] == [0, 1]
    assert [sample.line for sample in samples] == lines


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (b'{"a":', "not valid JSON: Expecting value at column 6"),
        (b'{"a":1} x', "not valid JSON: Extra data"),
        (b"\xff\xfe{}", "not valid UTF-8 at byte 1"),
        (b'{"a":"\xed\xa0\x80"}', "not valid UTF-8 at byte 7"),
        (b"[1]", "not a JSON object but a list"),
        (b'"text"', "not a JSON object but a string"),
        (b"null", "not a JSON object but null"),
        (b"true", "not a JSON object but a boolean"),
        (b"1", "not a JSON object but a number"),
        (b"1.5", "not a JSON object but a number"),
        (b'{"a":NaN}', "NaN is not a JSON value"),
        (b'{"a":-Infinity}', "-Infinity is not a JSON value"),
        (b'{"a":1e999}', "1e999 is out of the range"),
        (b'{"a":' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"a":' * 20000 + b"1" + b"}" * 20000, "nested deeper"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper"),
    ],
)
def test_a_malformed_row_is_told_and_reading_goes_on(bad: bytes, error: str) -> None:
    first, second, third = read(b'{"a":1}\n\n' + bad + b'\n{"a":3}\n')
    assert (first.row, third.row) == ({"a": 1}, {"a": 3})
    assert (second.row, second.raw, second.index, second.line) == (None, bad, 1, 3)
    assert second.error is not None
    assert second.error.startswith("line 3 is ")
    assert error in second.error
    assert (third.index, third.line) == (2, 4)


def test_a_row_of_the_greatest_depth_is_read_and_written_deep_in_the_stack() -> None:
    depth = MAX_DEPTH - 1
    (sample,) = read(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    assert sample.row is not None

    def write_at(frames: int) -> bytes:
        return write_at(frames - 1) if frames else write("a.jsonl", cast("dict[str, Any]", sample.row))

    frames = 0
    frame = sys._getframe()
    while frame.f_back is not None:
        frame, frames = frame.f_back, frames + 1
    written = write_at(sys.getrecursionlimit() - frames - MAX_DEPTH - 50)
    assert json.loads(written) == sample.row


def test_many_shallow_brackets_are_not_taken_for_depth() -> None:
    row = {"boxes": [[1, 2]] * 500, "text": "[" * 500}
    (sample,) = read(json.dumps(row).encode())
    assert sample.row == row


def test_a_row_of_5_megabytes_is_read() -> None:
    row = {"text": "é" * 2_500_000}
    (sample,) = read(write("a.jsonl", row))
    assert sample.row == row


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_bound_on_a_rows_size_is_exact(end: bytes) -> None:
    fits = b'{"a":"' + b"x" * 92 + b'"}'
    form = JsonLines(suffixes=(".jsonl",), max_row_bytes=len(fits))
    too_long = fits[:-2] + b'x"}'
    samples = read(fits + end + too_long + end + fits + end + too_long, form)
    assert [sample.raw for sample in samples] == [fits, b"", fits, b""]
    assert [sample.row is None for sample in samples] == [False, True, False, True]
    assert [sample.line for sample in samples] == [1, 2, 3, 4]
    assert samples[1].error == "line 2 is longer than 100 bytes"


class Zeros(io.RawIOBase):
    """A line of many zeros that no one holds in memory, then a row."""

    def __init__(self, size: int) -> None:
        self.parts: Iterator[bytes] = iter([b"0" * 2**16] * (size // 2**16) + [b'\n{"a":1}\n'])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = next(self.parts, b"")
        buffer[: len(part)] = part
        return len(part)


def test_an_overlong_row_is_passed_over_without_being_held() -> None:
    form = JsonLines(suffixes=(".jsonl",), max_row_bytes=2**20)
    tracemalloc.start()
    try:
        overlong, row = samples_of(cast("BinaryIO", Zeros(64 * 2**20)), form=form)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (overlong.row, overlong.raw) == (None, b"")
    assert row.row == {"a": 1}
    assert peak < 8 * 2**20


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_memory_does_not_grow_with_the_shard(suffix: str) -> None:
    # Hexadecimal digits compress to half: the stored shard has 25 MB, the text 50.
    digits = random.Random(0).randbytes(500).hex
    stream = io.BytesIO()
    with writing(stream, "a" + suffix) as writer:
        for index in range(50_000):
            raw = b'{"i":%d,"text":"%s"}' % (index, digits().encode())
            writer.write_unchanged(Sample(index=index, line=index + 1, row={}, raw=raw))
    stream.seek(0)
    tracemalloc.start()
    try:
        count = sum(sample.row is not None for sample in samples_of(stream, "a" + suffix))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 50_000
    assert peak < 4 * 2**20


def test_a_lone_surrogate_is_written_as_an_escape() -> None:
    assert write("a.jsonl", {"a": "\ud800é"}) == b'{"a": "\\ud800\\u00e9"}\n'
    assert write("a.jsonl", {"a": "é"}) == '{"a": "é"}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write("a.jsonl", {"a": value})


def test_the_stream_stays_the_callers() -> None:
    for suffix in SUFFIXES:
        stream = io.BytesIO(write("a" + suffix, {"a": 1}, {"a": 2}))
        samples = samples_of(stream, "a" + suffix)
        next(samples)
        del samples
        assert not stream.closed


def test_an_unbuffered_stream_is_not_read_byte_by_byte() -> None:
    class Counting(io.RawIOBase):
        calls = 0
        source = io.BytesIO(b'{"a":1}\n' * 1000)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.calls += 1
            return self.source.readinto(buffer)

    stream = Counting()
    assert len(list(samples_of(cast("BinaryIO", stream)))) == 1000
    assert stream.calls < 10


def test_the_suffix_tells_the_format() -> None:
    assert shard_format("x/y.jsonl") is shard_format("Y.NDJSON")
    assert shard_format("y.jsonl.gz") is not shard_format("y.jsonl")
    assert is_shard("y.jsonl.zst")
    assert not is_shard("y.json")
    assert not is_shard("jsonl")
    assert shard_stem("x/y.JSONL.gz") == "x/y"
    with pytest.raises(ConfigError, match=r"'x/y\.csv'.*\.jsonl, .*\.jsonl\.zst"):
        shard_format("x/y.csv")
