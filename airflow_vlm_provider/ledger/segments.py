"""Segments: the files that a journal is made of.

A segment is one Zstandard frame with a checksum, and in it JSON Lines: a header that says what this is, records, and
an end that says how many. So ``zstdcat segment | jq`` reads it, and whoever reads it knows whether it is whole: what
was cut off anywhere, or altered anywhere, is told from what was written.

A segment is written once, under a name of its own, and never changed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.manifest import Files
from airflow_vlm_provider.ledger.records import is_record

FORMAT = "vlm-journal"
VERSION = 1

MAX_LINE_BYTES = 16 * 1024 * 1024
FULL_BYTES = 128 * 1024 * 1024
"""So many bytes of lines are enough for one segment; more belong into the next."""
MAX_FILE_BYTES = 256 * 1024 * 1024
"""No file of a segment is larger: lines that don't compress, with room to spare."""
MAX_CONTENT_BYTES = 1024 * 1024 * 1024

_SPOOL_BYTES = 1024 * 1024
# Lines are compressed so many bytes at a time, because each call has its price.
_CHUNK_BYTES = 64 * 1024
# Zstandard can expand 4 bytes to 128 KiB. Taken in small steps, hostile data fills 64 MiB at the most.
_STEP_BYTES = 2 * 1024
_BATCH_LINES = 1024
_NAME = re.compile(r"journal/[0-9]{8}T[0-9]{12}-[0-9a-f]{8}-[0-9]{4,}(-all)?\.jsonl\.zst")


class TornSegmentError(VLMError):
    """A file is no whole segment that this version can read."""


def segment_name(time: datetime, writer: str, number: int, *, consolidated: bool = False) -> str:
    """Name a segment, below the shard's ledger folder; names sort by time.

    :param time: When it is written, with a time zone.
    :param writer: 8 hexadecimal digits that no other writer has.
    :param number: Which of its writer's segments it is.
    :param consolidated: Whether it replaces others.
    """
    stamp = time.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%S%f")
    return f"journal/{stamp}-{writer}-{number:04}{'-all' if consolidated else ''}.jsonl.zst"


def is_segment(name: str) -> bool:
    """Tell whether a name, below the shard's ledger folder, is that of a segment."""
    return _NAME.fullmatch(name) is not None


class SegmentWriter:
    """Collects lines, compressed and on disk beyond a megabyte, until they are saved as a segment.

    The same lines under the same header make the same bytes.

    :param header: JSON values that say where the lines come from.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        import zstandard

        self._spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - closed by close()
        self._compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._ended = False
        self.count = 0
        self.content_bytes = 0
        self._put(_spell({"format": FORMAT, "version": VERSION, **header}))

    @property
    def full(self) -> bool:
        """Whether further lines belong into another segment."""
        return self.content_bytes >= FULL_BYTES

    def add(self, line: bytes) -> None:
        """Add a line.

        :raises ValueError: it is no record, or too long to be read back.
        """
        if not is_record(line) or b"\n" in line or len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{line[:60]!r} ({len(line)} bytes) can't be a line of a journal.")
        self._put(line)
        self.count += 1

    def save(self, files: Files, name: str) -> None:
        """End the segment and write it, whole or not at all; after an error it can be tried again."""
        if not self._ended:
            self._put(_spell({"end": True, "records": self.count}))
            self._compress()
            self._spool.write(self._compressor.flush())
            self._ended = True
        self._spool.seek(0)
        with files.create(name) as stream:
            shutil.copyfileobj(self._spool, stream)

    def close(self) -> None:
        """Free what was collected."""
        self._spool.close()

    def _put(self, line: bytes) -> None:
        self._pending.append(line)
        self._pending_bytes += len(line) + 1
        self.content_bytes += len(line) + 1
        if self._pending_bytes >= _CHUNK_BYTES:
            self._compress()

    def _compress(self) -> None:
        self._pending.append(b"")
        self._spool.write(self._compressor.compress(b"\n".join(self._pending)))
        self._pending, self._pending_bytes = [], 0


def read_segment(data: bytes) -> list[bytes]:
    """Return a segment's records, without line ends.

    :raises TornSegmentError: it is cut off, altered, of a newer format, or no segment at all.
    """
    return [line for lines in _read(data) for line in lines]


def iter_segment(data: bytes) -> Iterator[list[bytes]]:
    """Yield a segment's records in lists of about a thousand, so that a large one need not be in memory whole.

    It is read twice: nothing of it is yielded before it is known to be whole.

    :raises TornSegmentError: it is cut off, altered, of a newer format, or no segment at all.
    """
    for _ in _read(data):
        pass
    yield from _read(data)


def _read(data: bytes) -> Iterator[list[bytes]]:
    """Yield the records as they come, and raise in the end when it was no whole segment."""
    header: dict[str, Any] | None = None
    lines: list[bytes] = []
    rest = b""
    count = 0
    for chunk in _decompress(data):
        complete, newline, tail = chunk.rpartition(b"\n")
        if newline:
            lines += (rest + complete).split(b"\n")
            rest = tail
        else:
            rest += tail
        if len(rest) > MAX_LINE_BYTES:
            raise TornSegmentError(f"It has a line of more than {MAX_LINE_BYTES} bytes.")
        if header is None and lines:
            header = _check_header(lines.pop(0))
        if len(lines) > _BATCH_LINES:
            # The last may be the end.
            batch, lines = lines[:-1], lines[-1:]
            count += _check_records(batch, after=count)
            yield batch
    if header is None:
        raise TornSegmentError("It has no header.")
    if rest or not lines:
        raise TornSegmentError("It has no end.")
    end = lines.pop()
    count += _check_records(lines, after=count)
    if _parse(end) != {"end": True, "records": count}:
        raise TornSegmentError(f"It holds {count} records, and does not end by saying so.")
    yield lines


def _decompress(data: bytes) -> Iterator[bytes]:
    """Yield what one frame holds, some of it at a time."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor().decompressobj()
    size = position = 0
    while not decompressor.eof:
        if position >= len(data):
            raise TornSegmentError("It is cut off." if data else "It is empty.")
        try:
            chunk = decompressor.decompress(data[position : position + _STEP_BYTES])
        except zstandard.ZstdError as error:
            raise TornSegmentError(f"It is not what was written ({error}).") from error
        position += _STEP_BYTES
        size += len(chunk)
        if size > MAX_CONTENT_BYTES:
            raise TornSegmentError(f"It holds more than {MAX_CONTENT_BYTES} bytes, which no segment does.")
        yield chunk
    if decompressor.unused_data or position < len(data):
        raise TornSegmentError("Something follows its end.")


def _check_header(line: bytes) -> dict[str, Any]:
    header = _parse(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TornSegmentError("Its first line is not the header of a journal's segment.")
    if header.get("version") != VERSION:
        raise TornSegmentError(
            f"It has version {header.get('version')!r} of the format, and this is version {VERSION}: "
            "a newer airflow-provider-vlm wrote it; upgrade this one."
        )
    return header


def _check_records(lines: list[bytes], *, after: int) -> int:
    """Return how many records these are, which come after so many others."""
    for number, line in enumerate(lines, start=after + 1):
        if not is_record(line):
            raise TornSegmentError(f"What should be record {number} is none.")
    return len(lines)


def _spell(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
