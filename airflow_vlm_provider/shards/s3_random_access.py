"""Reading one S3 object here and there."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.s3_reader import Entity, ResumingReader

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RandomAccessReader(io.RawIOBase):
    """The bytes of one version of an object, at any place.

    Each read is a request for just the range that is read, and fills the buffer unless the object ends. Broken
    connections are gone on from as :class:`~airflow_vlm_provider.shards.s3_reader.ResumingReader` does.

    :param get_object: boto3's ``get_object``, bound to bucket and key.
    :param uri: The object's URI, for messages.
    :param version: The version to read, as a response told of it.
    """

    def __init__(self, get_object: Callable[..., dict[str, Any]], *, uri: str, version: Entity) -> None:
        super().__init__()
        self._get_object = get_object
        self._uri = uri
        self._version = version
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
        with ResumingReader(
            self._get_object, uri=self._uri, version=self._version, start=start, stop=stop
        ) as part:
            while self._position < stop:
                self._position += part.readinto(view[self._position - start :])
        return stop - start
