"""How a video's file gets here: never whole in memory, hashed on its way, and then read by position.

A local file is opened and read once, for its hash; the open file is kept, so that what is decoded is what was
hashed, even if the name means another file by then. What comes over a network, or out of a shard, goes to an unlinked
temporary file, which is gone with the last reference to it, even after SIGKILL.

Invariant: the bytes that a :class:`VideoFile` delivers are those of its digest. A local file that is written to in
place afterwards is noticed by :meth:`VideoFile.check`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.shards.stores import ObjectChangedError, ObjectTooLargeError
from airflow_vlm_provider.shards.version_reader import VersionReader

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.http_media import HttpFetcher
    from airflow_vlm_provider.shards.http_urls import HttpUrl
    from airflow_vlm_provider.shards.stores import Store

MAX_VIDEO_BYTES = 8 * 1024**3
_CHUNK_BYTES = 1024 * 1024


class SpoolError(VLMError):
    """The worker has no room for a video: no sample's fault, so the task fails, and can be retried elsewhere."""


class VideoFile:
    """A video's bytes, as they were hashed. Safe to use from several threads at once.

    :param stream: A real file, open for reading; closed with the last reference to this.
    :param digest: SHA-256 of its bytes, in hexadecimal.
    :param size: How many there are.
    """

    def __init__(self, stream: BinaryIO, *, digest: str, size: int) -> None:
        self._stream = stream
        self._before = _state(stream)
        self.digest = digest
        self.size = size
        self.lock = threading.Lock()
        self.facts: Any = None
        """What was found out about it: the same for everybody who asks, see :mod:`.video_facts`."""

    def fileno(self) -> int:
        return self._stream.fileno()

    def reader(self) -> PositionReader:
        """Return a new reader, at the beginning, for one thread."""
        return PositionReader(self.fileno(), size=self.size)

    def read(self, size: int, offset: int) -> bytes:
        """Return some bytes from a place on."""
        return os.pread(self.fileno(), size, offset)

    def check(self) -> None:
        """
        Check that the bytes are still those that were hashed.

        :raises ObjectChangedError: the file was written to.
        """
        if _state(self._stream) != self._before:
            raise ObjectChangedError("The video was written to while it was being read; read it again.")


class PositionReader(VersionReader):
    """One thread's reader of a file that several threads have open.

    :ivar failed: Why the bytes did not come, which is not the video's fault; None as long as they do.
    """

    def __init__(self, fileno: int, *, size: int) -> None:
        # Without the file's name, as decoders guess from its ending.
        super().__init__(uri="the video", size=size)
        self._fileno = fileno
        self.failed: OSError | None = None

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                data = os.pread(self._fileno, len(view) - done, start + done)
                if not data:
                    raise ObjectChangedError("The video was cut short while it was being read.")
            except OSError as error:
                self.failed = error
                raise
            view[done : done + len(data)] = data
            done += len(data)


class VideoReading:
    """Reads videos from wherever they are.

    :param max_bytes: Most bytes that one may have.
    :param fetcher: Makes what reads URLs; None where none are read.
    """

    def __init__(self, *, max_bytes: int, fetcher: HttpFetcher | None) -> None:
        self.max_bytes = max_bytes
        self._fetcher = fetcher

    def read_stored(self, store: Store, name: str) -> tuple[VideoFile, str]:
        """
        Read an object of a store; return it with its identity.

        :raises ObjectTooLargeError: it has more than ``max_bytes``; then nothing is transferred.
        :raises ObjectChangedError: it was replaced meanwhile.
        :raises SpoolError: there is no room for it.
        """
        stream, info = store.open_version(name)
        try:
            if info.size > self.max_bytes:
                raise ObjectTooLargeError(f"{store.uri}{name} has {info.size} bytes.")
            if store.uri.startswith("file:"):
                return _hashed(stream, info.size), info.identity
        except BaseException:
            stream.close()
            raise
        with stream:
            spool = Spool()
            while chunk := stream.read(_CHUNK_BYTES):
                spool.write(chunk)
            return spool.file(), info.identity

    def read_url(self, url: HttpUrl) -> VideoFile:
        """Read what a URL answers; see :meth:`~airflow_vlm_provider.shards.http_media.HttpFetcher.download`."""
        assert self._fetcher is not None
        return self._fetcher.download(url, Spool).file()

    def read_embedded(self, data: bytes) -> VideoFile:
        """Keep a video that the shard itself holds, so that it need not stay in memory."""
        spool = Spool()
        spool.write(data)
        return spool.file()


class Spool:
    """A temporary file that takes a video's bytes as they come.

    :raises SpoolError: (here and when writing) there is no room for it.
    """

    def __init__(self) -> None:
        try:
            # Nobody ever finds it by its name, and it needs no removing.
            self._stream: BinaryIO = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)
        view = memoryview(data)
        try:
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:
            raise _no_room(error) from error

    def file(self) -> VideoFile:
        """Return what was written."""
        return VideoFile(self._stream, digest=self._hash.hexdigest(), size=self._size)


def _hashed(stream: BinaryIO, size: int) -> VideoFile:
    """Read a local file once, to its end, and keep it open."""
    # The state before the first byte is read: whatever changes after this is noticed.
    before = _state(stream)
    reader = PositionReader(stream.fileno(), size=size)
    digest = hashlib.sha256()
    chunk = bytearray(_CHUNK_BYTES)
    while count := reader.readinto(chunk):
        digest.update(memoryview(chunk)[:count])
    file = VideoFile(stream, digest=digest.hexdigest(), size=size)
    if _state(stream) != before or before[0] != size:
        raise ObjectChangedError("It was written to while it was being read; read it again.")
    return file


def _state(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _no_room(error: OSError) -> SpoolError:
    try:
        folder = tempfile.gettempdir()
    except OSError:
        folder = "any folder for temporary files"
    return SpoolError(
        f"A video can't be kept in {folder} while it is worked on: {error.strerror or error}. Make room there, or set "
        "TMPDIR to a folder on a larger disk, on every worker."
    )
