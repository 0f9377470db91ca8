"""The segments of other shards' journals that a task has read: their lines in a temporary file, found by key.

A task may have to read a thousand segments for ten answers of each. So reading one is cheap: its lines are appended
to one file, and where each of them lies is kept in memory, sorted by key, in 28 bytes.

Invariants:

- A segment is there with all its lines, or not at all.
- Nothing is left behind, not even by a process that is killed: the file has no name.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence

KEY_BYTES = 16
_PLACE = struct.Struct(">QI")  # where a line begins, and its length
RECORD_BYTES = KEY_BYTES + _PLACE.size


class ReadSegments:
    """Lines of the journal, by segment and key. Safe to use from several threads at once."""

    def __init__(self) -> None:
        # Unbuffered: what a full disk refused must not come up again when the file is closed.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by close()
        self._lock = threading.Lock()
        self._places: dict[Hashable, _Places] = {}

    def add(self, segment: Hashable, batches: Iterable[Sequence[bytes]]) -> None:
        """Add a segment with its lines, some of them at a time.

        :raises OSError: the temporary file can't be written.
        """
        records = []
        for lines in batches:
            at = self._append(b"".join(lines))
            for line in lines:
                records.append(bytes.fromhex(line[8:40].decode()) + _PLACE.pack(at, len(line)))
                at += len(line)
        records.sort()
        self._places[segment] = _Places(b"".join(records))

    def __contains__(self, segment: Hashable) -> bool:
        return segment in self._places

    def get(self, segment: Hashable, key: bytes) -> bytes | None:
        """A line of a segment; None when it has none with this key, or was not added. Takes some microseconds."""
        places = self._places.get(segment)
        place = None if places is None else places.find(key)
        if place is None:
            return None
        begin, length = place
        with self._lock:
            self._file.seek(begin)
            return self._file.read(length)

    def __len__(self) -> int:
        """How many lines there are in all."""
        return sum(map(len, list(self._places.values())))

    def close(self) -> None:
        """Free the file. Closing it again does nothing."""
        with self._lock:
            self._file.close()

    def _append(self, data: bytes) -> int:
        with self._lock:
            try:
                begin = self._file.seek(0, os.SEEK_END)
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"The temporary file of what other journals hold can't be written ({error.strerror}). Free space "
                    f"in {tempfile.gettempdir()}, or name another directory in TMPDIR.",
                ) from error
        return begin


class _Places:
    """Where a segment's lines lie: records of key and place, sorted, searched where they are."""

    __slots__ = ("_records",)

    def __init__(self, records: bytes) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records) // RECORD_BYTES

    def __getitem__(self, index: int) -> bytes:
        return self._records[index * RECORD_BYTES : index * RECORD_BYTES + KEY_BYTES]

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Where the line with a key begins, and its length; the last one's that was written, if there are several."""
        index = bisect_right(self, key) - 1
        if index < 0 or self[index] != key:
            return None
        begin, length = _PLACE.unpack_from(self._records, index * RECORD_BYTES + KEY_BYTES)
        return begin, length
