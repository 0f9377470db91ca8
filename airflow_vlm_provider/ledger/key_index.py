"""The key index: which of a destination's journal segments hold the answer to a request key.

A file of it holds, after a line of JSON that says what it is, one record of 20 bytes for each answer: the key's 16
bytes, and as a big-endian number which of the segments named in that line. Records are sorted, and segments are
numbered from the newest to the oldest, so that files are searched, and merged, as they are: 20 bytes of memory for
each answer and no Python objects. Keys are hashes, so compressing them would not pay.

Invariants, besides those of :mod:`~airflow_vlm_provider.ledger.index_files`:

- An index names segments that were there once. It may name one that is gone, and whoever looks there goes on.
- Segments' own names begin with the time at which they were written: in their order, they are in the order of age.
- When several segments hold a key, two of them stay: the newest, and the newest of another shard. A shard's next
  commit replaces its own segments, not another shard's.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

from airflow_vlm_provider.ledger.index_files import MAX_FILES, IndexFiles, similar
from airflow_vlm_provider.ledger.manifest import Files

FORMAT = "vlm-key-index"
VERSION = 1
KEY_BYTES = 16
NUMBER_BYTES = 4
RECORD_BYTES = KEY_BYTES + NUMBER_BYTES
SUFFIX = ".keys"
# Records that are merged at a time, as Python objects.
MERGE_RECORDS = 50_000


class KeyTable:
    """The content of one file: sorted records, searched where they lie.

    :param data: The file's bytes.
    :raises ValueError: these are not such a file's.
    """

    __slots__ = ("data", "segments", "start")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.start = data.find(b"\n") + 1
        header = json.loads(data[: self.start])
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        self.segments: list[str] = header["segments"]
        if header["records"] * RECORD_BYTES != len(data) - self.start:
            raise ValueError("it does not have as many records as it says")

    @classmethod
    def of(cls, segments: Sequence[str], records: bytes | bytearray) -> KeyTable:
        """Make the content of a file.

        :param segments: From the newest to the oldest.
        :param records: Sorted.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "records": len(records) // RECORD_BYTES,
            "segments": segments,
        }
        return cls(b"".join((json.dumps(header, separators=(",", ":")).encode(), b"\n", records)))

    def __len__(self) -> int:
        return (len(self.data) - self.start) // RECORD_BYTES

    def __getitem__(self, index: int) -> bytes:
        """The key of a record."""
        at = self.start + index * RECORD_BYTES
        return self.data[at : at + KEY_BYTES]

    def find(self, key: bytes) -> Iterator[str]:
        """The segments that hold a key."""
        index = bisect_left(self, key)
        while index < len(self) and self[index] == key:
            at = self.start + index * RECORD_BYTES + KEY_BYTES
            yield self.segments[int.from_bytes(self.data[at : at + NUMBER_BYTES], "big")]
            index += 1

    def records(self, first: int, end: int) -> Iterator[bytes]:
        """The records from one place to before another."""
        for at in range(self.start + first * RECORD_BYTES, self.start + end * RECORD_BYTES, RECORD_BYTES):
            yield self.data[at : at + RECORD_BYTES]

    def named(self) -> set[str]:
        """The segments that records name."""
        numbers = {record[KEY_BYTES:] for record in self.records(0, len(self))}
        return {self.segments[int.from_bytes(number, "big")] for number in numbers}


class KeyIndex:
    """The key index of a step at a destination, and what is known of it. Safe to use from several threads at once.

    :param files: The destination.
    """

    def __init__(self, files: Files, *, step: str) -> None:
        self._index = IndexFiles(
            files,
            folder=f"_vlm/_index/{step}/keys",
            suffix=SUFFIX,
            decode=KeyTable,
            encode=lambda table: table.data,
            union=union,
        )
        self._lock = threading.Lock()
        self._tables: tuple[KeyTable, ...] = ()

    def add(self, segment: str, keys: Iterable[bytes | str]) -> None:
        """Make a segment's answers known, to this object and to all that load the index from now on.

        :param segment: Its name, below the destination's root. It is there already.
        :param keys: Request keys, as 16 bytes or 32 hexadecimal digits.
        """
        records = bytearray()
        for key in sorted({_key(key) for key in keys}):
            records += key + bytes(NUMBER_BYTES)
        if records:
            table = KeyTable.of([segment], records)
            self._index.add(table)
            with self._lock:
                self._tables = _few((*self._tables, table))

    def load(self) -> None:
        """Read the index.

        :raises PermissionError: access is denied.
        :raises ConnectionError: the storage can't be reached.
        """
        self._know(self._index.load())

    def merge(self, max_files: int = MAX_FILES, *, gone: Collection[str] = ()) -> None:
        """Read the index, and merge its files when there are more than ``max_files``.

        That they can't be merged is only logged; otherwise this raises what :meth:`load` does.

        :param gone: Segments that were deleted; what names them is taken out, and it is an error if that fails.
        """
        out = frozenset(gone)
        self._know(
            self._index.merge(
                max_files=max_files,
                union=partial(union, gone=out),
                rewrite=(lambda table: not out.isdisjoint(table.segments)) if out else None,
            )
        )

    def find(self, key: str) -> list[str]:
        """The segments that hold a key's answer, or held it once: the newest first."""
        wanted = _key(key)
        found = {segment for table in self._tables for segment in table.find(wanted)}
        return sorted(found, key=_age, reverse=True) if len(found) > 1 else list(found)

    def _know(self, tables: Iterable[KeyTable]) -> None:
        few = _few(tuple(tables))
        with self._lock:
            self._tables = few


def union(tables: Sequence[KeyTable], gone: Collection[str] = ()) -> KeyTable:
    """One table of several, with at most two segments for each key.

    :param gone: Segments that are left out.
    """
    segments = sorted(
        {name for table in tables for name in table.named()}.difference(gone), key=_age, reverse=True
    )
    number = {name: index.to_bytes(NUMBER_BYTES, "big") for index, name in enumerate(segments)}
    numbers = [
        {
            old.to_bytes(NUMBER_BYTES, "big"): number[name]
            for old, name in enumerate(table.segments)
            if name in number
        }
        for table in tables
    ]
    merged = bytearray()
    begins = [0] * len(tables)
    for end in _bounds(sum(len(table) for table in tables)):
        records = set()
        for place, table in enumerate(tables):
            until = len(table) if end is None else bisect_left(table, end, begins[place])
            renumber = numbers[place]
            for record in table.records(begins[place], until):
                if (new := renumber.get(record[KEY_BYTES:])) is not None:
                    records.add(record[:KEY_BYTES] + new)
            begins[place] = until
        for _, same in groupby(sorted(records), key=lambda record: record[:KEY_BYTES]):
            merged += b"".join(_two(list(same), segments))
    return KeyTable.of(segments, merged)


def _two(records: list[bytes], segments: Sequence[str]) -> list[bytes]:
    """Of one key's records, from the newest to the oldest, those to keep."""
    if len(records) <= 2:
        return records
    shards = [_folder(segments[int.from_bytes(record[KEY_BYTES:], "big")]) for record in records]
    other = next((index for index, shard in enumerate(shards) if shard != shards[0]), 1)
    return [records[0], records[other]]


def _bounds(records: int) -> Iterator[bytes | None]:
    """Where the ranges of keys end that are merged one after another; the last has no end."""
    ranges = min(records // MERGE_RECORDS + 1, 2**16)
    for index in range(1, ranges):
        yield (index * 2**32 // ranges).to_bytes(4, "big")
    yield None


def _few(tables: tuple[KeyTable, ...]) -> tuple[KeyTable, ...]:
    """The same in few tables, since each of them is searched for every key."""
    if len(tables) <= MAX_FILES:
        return tables
    by_name = {str(index): table for index, table in enumerate(tables)}
    groups = similar({name: len(table.data) for name, table in by_name.items()})
    merged = [union([by_name.pop(name) for name in names]) for names in groups]
    return (*by_name.values(), *merged)


def _key(key: bytes | str) -> bytes:
    data = bytes.fromhex(key) if isinstance(key, str) else key
    if len(data) != KEY_BYTES:
        raise ValueError(f"{key!r} is no request key: those have {KEY_BYTES} bytes.")
    return data


def _age(segment: str) -> tuple[str, str]:
    folder, _, name = segment.rpartition("/")
    return name, folder


def _folder(segment: str) -> str:
    return segment.rpartition("/")[0]
