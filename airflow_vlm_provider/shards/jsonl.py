"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, cast

from airflow_vlm_provider.shards.compression import Codec, DecompressingReader
from airflow_vlm_provider.types import Row, Sample

BUFFER_BYTES = 256 * 1024
MAX_ROW_BYTES = 64 * 1024 * 1024
# Far below Python's recursion limit: what was read shallow in the stack must also be written deep in it.
MAX_DEPTH = 100
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonLines:
    """JSON Lines, plain or compressed.

    Lines end with LF or CRLF, the last may end with neither. Blank lines are no rows. ``NaN`` and
    ``Infinity`` make a row malformed although Python's parser takes them: they are not JSON, and other
    readers would reject the shard that is made of it.

    :param suffixes: Endings of the names of such shards.
    :param codec: The compression; None for none.
    :param max_row_bytes: A longer line is malformed; it is passed over without being held in memory, and its
        sample's ``raw`` is empty.
    """

    suffixes: tuple[str, ...]
    codec: Codec | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    seekable = False
    always_embeds = False

    @contextlib.contextmanager
    def open(self, stream: BinaryIO, *, keys: object = None) -> Iterator[JsonLinesReader]:  # noqa: ARG002
        yield JsonLinesReader(stream, self.codec, self.max_row_bytes)


class JsonLinesReader:
    """An open shard of JSON Lines."""

    embeds_media = False
    sidecar_of = None

    def __init__(self, stream: BinaryIO, codec: Codec | None, max_row_bytes: int) -> None:
        self._stream = stream
        self._codec = codec
        self.max_row_bytes = max_row_bytes

    def __iter__(self) -> Iterator[Sample]:
        raw = self._stream if self._codec is None else DecompressingReader(self._stream, self._codec)
        lines = io.BufferedReader(cast("io.RawIOBase", raw), BUFFER_BYTES)
        try:
            yield from self._samples(lines)
        finally:
            # A buffered reader that is collected closes what it reads from, and that is the caller's. It is
            # of no matter that detaching fails when the caller has closed the stream already.
            with contextlib.suppress(ValueError):
                lines.detach()

    def writer(self, stream: BinaryIO, *, generated: Mapping[str, Any]) -> JsonLinesWriter:  # noqa: ARG002
        return JsonLinesWriter(stream, self._codec)

    def _samples(self, lines: BinaryIO) -> Iterator[Sample]:
        index = 0
        fault: str | None
        for number, line in enumerate(self._lines(lines), start=1):
            if line is None:
                row, fault = None, f"is longer than {self.max_row_bytes} bytes"
            elif not line.strip():
                continue
            else:
                row, fault = parse_object(line)
            error = None if fault is None else f"line {number} {fault}"
            yield Sample(index=index, line=number, row=row, raw=line or b"", error=error)
            index += 1

    def _lines(self, lines: BinaryIO) -> Iterator[bytes | None]:
        """Yield each line without its end; None for one that is too long."""
        line_end = 2
        first = True
        while line := lines.readline(self.max_row_bytes + line_end):
            complete = line.endswith(b"\n")
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if first:
                line = line.removeprefix(BYTE_ORDER_MARK)
                first = False
            if len(line) <= self.max_row_bytes:
                yield line
                continue
            del line
            while not complete and (rest := lines.readline(BUFFER_BYTES)):
                complete = rest.endswith(b"\n")
            yield None


class JsonLinesWriter:
    """Writes rows as UTF-8 JSON, one a line.

    :param stream: Takes the bytes; it is left open.
    """

    def __init__(self, stream: BinaryIO, codec: Codec | None) -> None:
        self._stream = stream
        self._compressor: Any = None if codec is None else codec.compressor()

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._compressor is not None:
            self._stream.write(self._compressor.flush())

    def write(self, sample: Sample, rows: Sequence[Row]) -> None:  # noqa: ARG002
        for row in rows:
            self._write_line(encode_object(row))

    def write_unchanged(self, sample: Sample) -> None:
        self._write_line(sample.raw)

    def _write_line(self, raw: bytes) -> None:
        line = raw + b"\n"
        self._stream.write(line if self._compressor is None else self._compressor.compress(line))


def encode_object(row: Mapping[str, Any]) -> bytes:
    """
    Return a row as one line of UTF-8 JSON, without a line end.

    :raises TypeError, ValueError: A value is not a JSON value.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A lone surrogate has no UTF-8; JSON can hold it as an escape.
        return json.dumps(row, allow_nan=False).encode()


def parse_object(line: bytes) -> tuple[Row | None, str | None]:
    """Return the row that JSON text holds, or None and what is wrong with the text, as the rest of a sentence."""
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return None, f"is not valid UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"is not valid JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return None, f"is not valid JSON: {error}"
    except RecursionError:
        return None, f"is nested deeper than {MAX_DEPTH} levels"
    if not isinstance(row, dict):
        return None, f"is not a JSON object but {_KINDS[type(row)]}"
    # Brackets are counted first because that is quick, and few rows have so many.
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deeper(row, MAX_DEPTH):
        return None, f"is nested deeper than {MAX_DEPTH} levels"
    return row, None


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for each in level for child in _children(each) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value; write null")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of the range of numbers")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
