"""A store on any file system that fsspec knows: ``gs://``, ``abfs://`` and whatever else has one.

What is atomic depends on what is below:

* **Object stores** (Google's, Azure's, ...): :meth:`FsspecStore.create` ends with one upload under the object's own
  name, which shows whole or not at all. A writer that is killed leaves at most parts that nobody sees.
* **File systems that move files** (SFTP, HDFS, SMB, ...): the file is written under a hidden name and then moved, which
  is as atomic as their own moving is. One that does not move a file over another refuses to write an object again,
  and :class:`~airflow_vlm_provider.shards.stores.StoreError` says so. A writer that is killed leaves the hidden file.
* **File systems of another kind** are written to in one call; what becomes of it when it breaks off is theirs.

Two versions of a file are told apart by what the file system says of them: an ETag, a checksum, a generation, or a time
and the size. Where it is only a time of whole seconds, two versions of the same size within one second are not.

Links are not files, and are not read; directories that are links are the server's matter, which is to say that only
trusted people should be able to make them below the root.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import tenacity

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.fsspec_entries import fsspec_errors, object_info
from airflow_vlm_provider.shards.fsspec_reader import FsspecReader
from airflow_vlm_provider.shards.stores import (
    BUCKET_SCHEMES,
    InvalidNameError,
    NotARegularFileError,
    ObjectChangedError,
    ObjectInfo,
    ObjectTooLargeError,
    StoreError,
    check_name,
    in_order,
    is_hidden,
    split_uri,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

READ_BUFFER_BYTES = 4 * 1024 * 1024
# Up to here, an object is uploaded in a single request.
ONE_REQUEST_BYTES = 8 * 1024 * 1024
# Of an object that is replaced each time while it is fetched.
FETCH_ATTEMPTS = 3


class FsspecStore:
    """The files below a path of an fsspec file system.

    Listings are made folder by folder, one folder's in memory at a time, and never from the file system's cache.

    :param uri: The root, ``gs://bucket/prefix``, with or without a trailing slash.
    :param filesystem: Makes the file system for a URI, called once when it is first needed; None uses fsspec's own
        configuration.
    :raises ConfigError: The URI is malformed or incomplete. When it is first used: there is no such file system.
    """

    def __init__(self, *, uri: str, filesystem: Callable[[str], AbstractFileSystem] | None = None) -> None:
        self._scheme, authority, path = split_uri(uri)
        path = path.strip("/")
        self._uri = f"{self._scheme}://{authority}/{path}{'/' if path else ''}"
        # The connection before the bucket is Airflow's; file systems know no such thing.
        self._location = f"{self._scheme}://{authority.rpartition('@')[2]}/{path}"
        self._filesystem = filesystem or _default_filesystem
        self._made: tuple[Any, str] | None = None
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return self._uri

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        if folder:
            check_name(folder)
        return self._walk(folder)

    def stat(self, name: str) -> ObjectInfo:
        check_name(name)
        fs, path = self._place(name)
        with fsspec_errors(self.uri + name):
            fs.invalidate_cache()
            return object_info(name, fs.info(path), self.uri + name)

    def stat_many(self, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        folders: dict[str, dict[str, ObjectInfo]] = {}
        for name in in_order(names):
            try:
                check_name(name)
            except InvalidNameError:
                yield name, None
                continue
            folder = name.rpartition("/")[0]
            if folder not in folders:
                # Names come sorted: of other folders than those that this one is in, none is left.
                for done in [
                    each for each in folders if not f"{folder}/".startswith(f"{each}/" if each else "")
                ]:
                    del folders[done]
                folders[folder] = {
                    info.name: info for info in self._entries(folder).values() if isinstance(info, ObjectInfo)
                }
            yield name, folders[folder].get(name)

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(self._reader(name), READ_BUFFER_BYTES)

    def open_version(self, name: str) -> tuple[BinaryIO, ObjectInfo]:
        info = self.stat(name)
        return io.BufferedReader(self._reader(name, version=info), READ_BUFFER_BYTES), info

    def open_seekable(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._reader(name))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self.fetch(name, max_bytes=max_bytes)[0]

    def fetch(self, name: str, *, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ObjectChangedError),
            stop=tenacity.stop_after_attempt(FETCH_ATTEMPTS),
            reraise=True,
        )
        return retrying(self._fetch, name, max_bytes)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """
        Write an object; see the module's text for what is atomic where. The content is spooled to a local file.
        """
        check_name(name)
        fs, path = self._place(name)
        with tempfile.NamedTemporaryFile() as spool:
            yield cast("BinaryIO", spool)
            spool.flush()
            with fsspec_errors(self.uri + name):
                if self._moves(fs):
                    self._put_and_move(fs, spool.name, path, name)
                else:
                    _put(fs, spool.name, path)
                fs.invalidate_cache()

    def delete(self, name: str) -> None:
        check_name(name)
        fs, path = self._place(name)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError), fsspec_errors(self.uri + name):
            fs.rm_file(path)

    def _fetch(self, name: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        info = self.stat(name)
        if info.size > max_bytes:
            raise ObjectTooLargeError(
                f"{self.uri + name} has {info.size} bytes; at most {max_bytes} are taken."
            )
        data = bytearray(info.size)
        self._reader(name, version=info).readinto(data)
        return bytes(data), info

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        for name, info in sorted(self._entries(folder).items()):
            if is_hidden(name.rstrip("/").rpartition("/")[2]):
                continue
            if isinstance(info, ObjectInfo):
                yield info
            else:
                yield from self._walk(name.rstrip("/"))

    def _entries(self, folder: str) -> dict[str, ObjectInfo | None]:
        """Return what is in a folder, by name: files' entries, and None for folders, whose names end in a slash."""
        fs, path = self._place(folder)
        with fsspec_errors(self.uri + folder):
            fs.invalidate_cache()
            try:
                listed = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            entries: dict[str, ObjectInfo | None] = {}
            for entry in listed:
                # The folder's own mark is among them where consoles have made one.
                own, slash, base = entry["name"].rstrip("/").rpartition("/")
                if own != path.rstrip("/") or not base or not slash:
                    continue
                name = f"{folder}/{base}" if folder else base
                try:
                    entries[name] = object_info(name, entry, self.uri + name)
                except IsADirectoryError:
                    entries[name + "/"] = None
                except NotARegularFileError:
                    continue
            return entries

    def _reader(self, name: str, *, version: ObjectInfo | None = None) -> FsspecReader:
        version = version or self.stat(name)
        fs, path = self._place(name)

        def read_range(start: int, stop: int) -> bytes:
            with fsspec_errors(self.uri + name):
                data: bytes = fs.cat_file(path, start=start, end=stop)
                return data

        return FsspecReader(read_range, lambda: self.stat(name), version=version, uri=self.uri + name)

    def _put_and_move(self, fs: Any, local: str, path: str, name: str) -> None:
        folder = path.rpartition("/")[0]
        fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"
        try:
            fs.put_file(local, temporary)
            try:
                fs.mv(temporary, path)
            except FileExistsError as error:
                raise StoreError(
                    f"{self.uri + name} can't be written again: its file system does not move a file over another, so "
                    "nothing could be replaced without being gone for a moment. Use another storage as destination."
                ) from error
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise

    def _moves(self, fs: Any) -> bool:
        """Whether files are moved by the file system itself, and not by copying their bytes."""
        from fsspec import AbstractFileSystem

        return self._scheme not in BUCKET_SCHEMES and type(fs).mv is not AbstractFileSystem.mv

    def _place(self, name: str) -> tuple[Any, str]:
        """Return the file system, and the path in it of an object or a folder; of the root for an empty name."""
        with self._lock:
            if self._made is None:
                fs = self._filesystem(self.uri)
                self._made = fs, fs._strip_protocol(self._location).rstrip("/")
        fs, root = self._made
        return fs, f"{root}/{name}" if name else root or fs.root_marker


def _put(fs: Any, local: str, path: str) -> None:
    """Upload a file in one request where it is small, and else in parts that show as a whole when all have arrived."""
    from fsspec.asyn import AsyncFileSystem

    # Elsewhere put_file() writes to a stream, and a stream that breaks off is closed: half an object would show.
    if isinstance(fs, AsyncFileSystem) and Path(local).stat().st_size > ONE_REQUEST_BYTES:
        fs.put_file(local, path)
    else:
        fs.pipe_file(path, Path(local).read_bytes())


def _default_filesystem(uri: str) -> AbstractFileSystem:
    import fsspec

    scheme = split_uri(uri)[0]
    try:
        return fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{uri!r}: there is no file system for {scheme}:// here ({error}).") from error
