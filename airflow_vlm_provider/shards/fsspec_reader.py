"""Reading one file of an fsspec file system."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from airflow_vlm_provider.shards.stores import ObjectChangedError, ObjectInfo

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# So much of a file is in memory beside the buffer that it is read into.
CHUNK_BYTES = 4 * 1024 * 1024


class VersionReader(io.RawIOBase):
    """The bytes of one version of a file, at any place.

    fsspec has no request for a range of a certain version, so after each range the file's identity is looked at:
    while it is the same as when reading began, the bytes were of that version.

    :param read_range: Returns the file's bytes from the first place up to the second.
    :param look: Returns the file's entry as it is now.
    :param version: The entry of the version to read.
    :param uri: The file's URI, for messages.
    """

    def __init__(
        self,
        read_range: Callable[[int, int], bytes],
        look: Callable[[], ObjectInfo],
        *,
        version: ObjectInfo,
        uri: str,
    ) -> None:
        super().__init__()
        self._read_range = read_range
        self._look = look
        self._version = version
        self._uri = uri
        self._position = 0

    @property
    def name(self) -> str:
        return self._uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._version.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._uri}: there is no place {base + offset}.")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        # Python's own asks for a few kilobytes at a time.
        data = bytearray(max(self._version.size - self._position, 0))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self.closed:
            raise ValueError(f"{self._uri} was read after it was closed.")
        view = memoryview(buffer).cast("B")
        start = self._position
        stop = min(start + len(view), self._version.size)
        if start >= stop:
            return 0
        place = start
        try:
            while place < stop:
                data = self._read_range(place, min(place + CHUNK_BYTES, stop))
                if not data:
                    raise ConnectionError(f"{self._uri} ended after {place} of {self._version.size} bytes.")
                view[place - start : place - start + len(data)] = data
                place += len(data)
        finally:
            # First of all: what fails because the file was replaced is told as that.
            self._check()
        self._position = stop
        return stop - start

    def _check(self) -> None:
        try:
            now = self._look()
        except FileNotFoundError as error:
            raise ObjectChangedError(f"{self._uri} was deleted while it was being read.") from error
        if now != self._version:
            raise ObjectChangedError(f"{self._uri} was replaced while it was being read; read it again.")
