"""Reading one file of an fsspec file system."""

from __future__ import annotations

from collections.abc import Callable

from airflow_vlm_provider.shards.stores import ObjectChangedError, ObjectInfo
from airflow_vlm_provider.shards.version_reader import VersionReader

# So much of a file is in memory beside the buffer that it is read into.
CHUNK_BYTES = 4 * 1024 * 1024


class FsspecReader(VersionReader):
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
        super().__init__(uri=uri, size=version.size)
        self._read_range = read_range
        self._look = look
        self._version = version

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        try:
            while done < len(view):
                place = start + done
                data = self._read_range(place, min(place + CHUNK_BYTES, start + len(view)))
                if not data:
                    raise ConnectionError(f"{self._uri} ended after {place} of {self._size} bytes.")
                view[done : done + len(data)] = data
                done += len(data)
        finally:
            # First of all: what fails because the file was replaced is told as that.
            self._check()

    def _check(self) -> None:
        try:
            now = self._look()
        except FileNotFoundError as error:
            raise ObjectChangedError(f"{self._uri} was deleted while it was being read.") from error
        if now != self._version:
            raise ObjectChangedError(f"{self._uri} was replaced while it was being read; read it again.")
