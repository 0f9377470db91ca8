"""A table of bytes by bytes that lives in a temporary file: as large as the disk allows, at a fixed cost in memory.

Invariants:

- Memory stays within the page cache's bound and that of the rows that are yet to be written, however many there are.
- Nothing is left behind, not even by a process that is killed: SQLite removes the file's name as soon as it is open.
- A key has one value: the last that was put, or the one that ``choose`` chose.

Values stand apart from the keys, in the order in which they came. Keys come in random order; in one tree with them,
almost every row put would rewrite a page of some other rows.

Rows that were put just now wait in memory until there are some hundred of them, and most keys that were never put are
known by one bit not to be there: every call of SQLite makes the calling thread wait for the others, and an event loop
should not.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

# The rest is in the operating system's cache of files for as long as there is memory: more would gain nothing.
CACHE_KIB = 4 * 1024
# Rows put, or read, before another thread gets its turn: a few milliseconds.
TURN_ROWS = 500
# Rows wait in memory until there are so many of them, or so many bytes.
WAITING_ROWS = TURN_ROWS
WAITING_BYTES = 1024 * 1024
# One bit for each hash of a key, 256 KiB in all. With 100,000 rows, one in twenty of the other keys has its bit set.
HASHES = 2**21

_TABLES = """
CREATE TABLE rows (number INTEGER PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE keys (key BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
"""
_PUT = "INSERT INTO keys VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET number = excluded.number"
_IF_CHOSEN = """ WHERE chosen((SELECT value FROM rows WHERE rows.number = keys.number),
                              (SELECT value FROM rows WHERE rows.number = excluded.number))"""
_GET = "SELECT value FROM keys JOIN rows USING (number) WHERE key = ?"
_NEXT = "SELECT key, value FROM keys JOIN rows USING (number) WHERE key > ? ORDER BY key LIMIT ?"


class KeyValueFile:
    """Bytes by bytes, in a temporary file that goes with this object. Safe to use from several threads at once.

    :param choose: Given the value that is there and another one for the same key, returns the one to keep; None
        keeps the last.
    """

    def __init__(self, *, choose: Callable[[bytes, bytes], bytes] | None = None) -> None:
        self._lock = threading.Lock()
        self._choose = choose or _last
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._hashes = bytearray(HASHES // 8)
        self._count = 0
        # An empty name is a database of SQLite's own in a temporary file, which it writes once the cache is full.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._database.executescript(_TABLES)
        self._put = _PUT
        if choose is not None:
            self._put += _IF_CHOSEN
            self._database.create_function("chosen", 2, lambda old, new: choose(old, new) != old)

    def put_many(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Put keys with their values.

        :raises OSError: the temporary file can't be written; the table is then of no more use.
        """
        pairs = iter(pairs)
        while batch := list(islice(pairs, TURN_ROWS)):
            with self._turn() as database:
                for key, value in batch:
                    byte, bit = _place(key)
                    self._hashes[byte] |= bit
                    other = self._waiting.get(key)
                    self._waiting[key] = value if other is None else self._choose(other, value)
                    self._waiting_bytes += len(key) + len(value)
                if len(self._waiting) >= WAITING_ROWS or self._waiting_bytes >= WAITING_BYTES:
                    self._write_waiting(database)

    def get(self, key: bytes) -> bytes | None:
        """The key's value; None when it has none. Takes some microseconds."""
        byte, bit = _place(key)
        if not self._hashes[byte] & bit:
            return None
        with self._turn() as database:
            waiting = self._waiting.get(key)
            row = database.execute(_GET, (key,)).fetchone() if self._count else None
        if row is None or waiting is None:
            return waiting if row is None else row[0]
        return self._choose(row[0], waiting)

    def items_sorted(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value, in the order of the keys; what is put meanwhile may or may not be among them."""
        last: bytes | int = -1  # SQLite sorts numbers before bytes
        while True:
            with self._turn() as database:
                self._write_waiting(database)
                batch = database.execute(_NEXT, (last, TURN_ROWS)).fetchall()
            if not batch:
                return
            yield from batch
            last = batch[-1][0]

    def __len__(self) -> int:
        with self._turn() as database:
            self._write_waiting(database)
            count: int = database.execute("SELECT count(*) FROM keys").fetchone()[0]
        return count

    def close(self) -> None:
        """Free the file. The table can't be used any more; closing it again does nothing."""
        with self._lock:
            self._database.close()

    def _write_waiting(self, database: sqlite3.Connection) -> None:
        if not self._waiting:
            return
        numbered = [(number, *pair) for number, pair in enumerate(self._waiting.items(), self._count)]
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO rows VALUES (?, ?)", ((number, value) for number, _, value in numbered)
        )
        database.executemany(self._put, ((key, number) for number, key, _ in numbered))
        database.execute("COMMIT")
        self._count += len(numbered)
        self._waiting.clear()
        self._waiting_bytes = 0

    @contextmanager
    def _turn(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._database
            except sqlite3.OperationalError as error:
                raise OSError(
                    errno.EIO,
                    f"The temporary file of what is known can't be used ({error}). Free space where temporary "
                    "files are, or name another directory in TMPDIR.",
                ) from error


def _place(key: bytes) -> tuple[int, int]:
    """Which byte of the bits, and which bit in it, stands for a key."""
    number = hash(key) % HASHES
    return number >> 3, 1 << (number & 7)


def _last(old: bytes, new: bytes) -> bytes:  # noqa: ARG001
    return new
