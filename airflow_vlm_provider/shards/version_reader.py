"""Reading one version of an object here and there: what is the same whatever the storage."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class VersionReader(io.RawIOBase):
    """The bytes of one version of an object, at any place. Each read fills its buffer unless the object ends.

    :param uri: The object's URI, for messages.
    :param size: Of the version, in bytes.
    """

    def __init__(self, *, uri: str, size: int) -> None:
        super().__init__()
        self._uri = uri
        self._size = size
        self._position = 0

    @abstractmethod
    def _fill(self, view: memoryview, start: int) -> None:
        """Fill a buffer with the version's bytes from a place on; there are as many.

        :raises ObjectChangedError: the object is another one by now, or gone.
        :raises ConnectionError: the bytes did not arrive.
        """

    @property
    def name(self) -> str:
        return self._uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._uri}: there is no place {base + offset}.")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        # Python's own asks for a few kilobytes at a time.
        data = bytearray(max(self._size - self._position, 0))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self.closed:
            raise ValueError(f"{self._uri} was read after it was closed.")
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._position))
        if length:
            self._fill(view[:length], self._position)
            self._position += length
        return length
