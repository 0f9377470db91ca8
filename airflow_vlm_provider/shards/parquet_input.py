"""A Parquet file's bytes as pyarrow reads them: here and there, in few reads, and every fault told apart."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO

from airflow_vlm_provider.errors import ShardError

# What is kept of what was read ahead, all columns together.
AHEAD_BYTES = 16 * 1024 * 1024
# What is read at once for one column at most, so that a remote file costs few requests.
READ_BYTES = 4 * 1024 * 1024


class ParquetInput(io.RawIOBase):
    """A seekable stream for pyarrow. It is read in the caller's thread only, and left open.

    Columns are read side by side, each forward, in pieces of their own size: as many places are read ahead. What
    comes next after a small column is the next column, or the next row group.

    :param stream: The file's bytes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._size = stream.seek(0, io.SEEK_END)
        self._position = 0
        self._places = 1
        # Start and bytes; the last one read is the last.
        self._ahead: list[tuple[int, bytes]] = []
        self._failure: BaseException | None = None

    def expect(self, places: int) -> None:
        """Say at how many places the file will be read by turns."""
        self._places = max(1, places)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = self._size - self._position
        data = self._take(self._position, size)
        if len(data) < size:
            data += self._read(self._position + len(data), size - len(data))
        self._position += len(data)
        return data

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """
        Tell the stream's faults from the file's.

        :raises ShardError: The file is damaged. What the stream raised comes as it was.
        """
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if self._failure is not None:
                # pyarrow may have made an error of its own of it.
                raise self._failure from None
            reason = " ".join(str(error).split())
            raise ShardError(
                f"The shard is no Parquet file, or it is damaged or cut off ({reason}). Write it again, or take it out."
            ) from error

    def _take(self, start: int, size: int) -> bytes:
        """What was read ahead of so many bytes: all, the first of them, or none."""
        for at, data in self._ahead:
            if at <= start < at + len(data):
                return data[start - at : start - at + size]
        return b""

    def _read(self, start: int, size: int) -> bytes:
        """Read so many bytes, fewer only where the file ends, and some ahead."""
        piece = min(READ_BYTES, AHEAD_BYTES // self._places)
        if size >= piece:
            return self._fetch(start, size)
        # Up to what is there already.
        end = min((at for at, _ in self._ahead if at >= start + size), default=start + piece)
        data = self._fetch(start, min(piece, end - start))
        self._ahead.append((start, data))
        while sum(len(each) for _, each in self._ahead) > piece * self._places:
            del self._ahead[0]
        return data[:size]

    def _fetch(self, start: int, size: int) -> bytes:
        """Read so many bytes, fewer only where the file ends."""
        parts = []
        size = min(size, self._size - start)
        try:
            self._stream.seek(start)
            while size > 0 and (part := self._stream.read(size)):
                parts.append(part)
                size -= len(part)
        except BaseException as error:
            self._failure = error
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)
