"""A Parquet file's bytes as pyarrow reads them: here and there, in few reads, and every fault told apart."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO

from airflow_vlm_provider.errors import ShardError

# What is read at once when a whole row group is no larger, so that a remote one costs one request.
HELD_BYTES = 8 * 1024 * 1024


class ParquetInput(io.RawIOBase):
    """A seekable stream for pyarrow. It is read in the caller's thread only, and left open.

    :param stream: The file's bytes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._size = stream.seek(0, io.SEEK_END)
        self._position = 0
        self._held = b""
        self._held_at = 0
        self._failure: BaseException | None = None

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
        at = self._position - self._held_at
        if at >= 0 and at + size <= len(self._held):
            data = self._held[at : at + size]
        else:
            data = self._fetch(self._position, size)
        self._position += len(data)
        return data

    def hold(self, start: int, size: int) -> None:
        """Keep a part of the file, if it is not too large, in place of the one that was kept before."""
        self._held = b""
        if start >= 0 and 0 < size <= HELD_BYTES:
            self._held_at, self._held = start, self._fetch(start, size)

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

    def _fetch(self, start: int, size: int) -> bytes:
        """Read so many bytes, fewer only where the file ends."""
        parts = []
        try:
            self._stream.seek(start)
            while size > 0 and (part := self._stream.read(size)):
                parts.append(part)
                size -= len(part)
        except BaseException as error:
            self._failure = error
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)
