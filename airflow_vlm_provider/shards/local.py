"""A store in a directory of a local or mounted file system."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    NotARegularFileError,
    ObjectChangedError,
    ObjectInfo,
    ObjectTooLargeError,
    OutsideRootError,
    check_name,
    in_order,
    is_hidden,
)

# A writer that was killed leaves its temporary file; no writer that lives lets so much time pass between two writes.
ABANDONED_S = 24 * 3600
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


class LocalStore:
    """The files below a directory.

    Symbolic links are followed as long as they stay below the root. Links to directories are not listed: what
    is below the root is listed under its own name. Directories stay when their last file is deleted.

    What is replaced by a rename, as :meth:`create` does, is read whole. A file that somebody writes to in place is
    told only by :meth:`fetch`; a stream delivers what there is.

    :param root: Absolute path; it need not exist yet.
    """

    def __init__(self, *, root: str) -> None:
        self._root = Path(root)
        self._resolved: str | None = None
        self._cleaned: set[Path] = set()

    @property
    def uri(self) -> str:
        return "file://" + str(self._root).rstrip("/") + "/"

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        if folder:
            check_name(folder)
            with _name_errors(self.uri + folder):
                self._inside(folder)
            return self._walk(folder + "/")
        return self._walk("")

    def stat(self, name: str) -> ObjectInfo:
        with _name_errors(self.uri + name):
            return _object_info(name, _regular_file(self._path(name)))

    def stat_many(self, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        resolved: dict[str, Path | None] = {}
        for name in in_order(names):
            folder, _, file_name = name.rpartition("/")
            if folder not in resolved:
                resolved[folder] = self._folder(folder)
            yield name, self._entry(name, resolved[folder], file_name)

    def open(self, name: str) -> BinaryIO:
        return self._open(name, buffering=-1)

    def open_version(self, name: str) -> tuple[BinaryIO, ObjectInfo]:
        stream = self.open(name)
        return stream, _object_info(name, os.fstat(stream.fileno()))

    def open_seekable(self, name: str) -> BinaryIO:
        return self._open(name, buffering=0)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self.fetch(name, max_bytes=max_bytes)[0]

    def fetch(self, name: str, *, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        with self.open(name) as stream:
            # Asked for more than there is, Python makes room for all of it first, which costs more than the reading.
            before = os.fstat(stream.fileno())
            data = stream.read(min(before.st_size, max_bytes) + 1)
            if len(data) > before.st_size:  # it has grown since, or is one of /proc's
                data += stream.read(max_bytes + 1 - len(data))
            after = os.fstat(stream.fileno())
        if len(data) > max_bytes:
            raise ObjectTooLargeError(f"{self.uri + name} is larger than {max_bytes} bytes.")
        info = _object_info(name, after)
        if info != _object_info(name, before):
            raise ObjectChangedError(
                f"{self.uri + name} was written to while it was being read; read it again."
            )
        return data, info

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        check_name(name)
        # Only the directory is resolved: a link in the object's own place is replaced, not followed.
        directory_name, _, file_name = name.rpartition("/")
        with _name_errors(self.uri + name):
            directory = self._inside(directory_name)
            target = directory / file_name
            # First, because in a directory that is not there no name is too long.
            directory.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        self._remove_abandoned(directory)
        # Hidden, so that no listing takes it for data should the process be killed before it can remove it.
        temporary = directory / f".{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            with _name_errors(self.uri + name):
                temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)

    def delete(self, name: str) -> None:
        check_name(name)
        # As for create(): a link in the object's own place is removed, not followed.
        folder, _, file_name = name.rpartition("/")
        absent = (FileNotFoundError, IsADirectoryError, NotARegularFileError)
        with contextlib.suppress(*absent), _name_errors(self.uri + name):
            path = self._inside(folder) / file_name
            if not path.is_symlink():
                _regular_file(path)
            path.unlink()

    def _open(self, name: str, *, buffering: int) -> BinaryIO:
        with _name_errors(self.uri + name):
            path = self._path(name)
            _regular_file(path)
            # Should a FIFO have taken the file's place since, opening it must not wait for a writer.
            return open(path, "rb", buffering, opener=_open_without_blocking)

    def _folder(self, folder: str) -> Path | None:
        """Return the real path of a folder below the root; None when no object can be in it."""
        try:
            if folder:
                check_name(folder)
            with _name_errors(self.uri + folder):
                return self._inside(folder)
        except InvalidNameError:
            return None

    def _entry(self, name: str, folder: Path | None, file_name: str) -> ObjectInfo | None:
        """Look up an object whose folder has been resolved."""
        try:
            check_name(name)
            if folder is None:
                return None
            with _name_errors(self.uri + name):
                status = os.lstat(os.path.join(folder, file_name))  # noqa: PTH118  a Path for each costs more than the look-up
            if stat.S_ISLNK(status.st_mode):
                return self.stat(name)
        except (FileNotFoundError, IsADirectoryError, NotARegularFileError, InvalidNameError):
            return None
        return _object_info(name, status) if stat.S_ISREG(status.st_mode) else None

    def _remove_abandoned(self, directory: Path) -> None:
        """Remove what writers left in a directory when they were killed, as far as that can be done; once is enough."""
        if directory in self._cleaned:
            return
        self._cleaned.add(directory)
        with contextlib.suppress(OSError), os.scandir(directory) as scan:
            for entry in scan:
                if _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                            os.unlink(entry.path)  # noqa: PTH108

    def _path(self, name: str) -> Path:
        """Return the real path of the object that a name stands for."""
        check_name(name)
        return self._inside(name)

    def _inside(self, relative: str) -> Path:
        """Return the real path of what is below the root, or of the root itself for an empty one."""
        root = self._real_root()
        path = os.path.join(root, relative)  # noqa: PTH118  a Path for each costs more than the look-up
        # Most names have no link in them. Only then is the whole path gone through again, the root's part included.
        if not _has_link(root, relative):
            return Path(path)
        path = os.path.realpath(path)  # Path.resolve() raises on a loop of links
        if os.path.commonpath((root, path)) != root:
            raise OutsideRootError(
                f"{self.uri + relative} is a link that leads out of {self.uri}; "
                "choose a root that holds the link's target too."
            )
        return Path(path)

    def _real_root(self) -> str:
        if self._resolved is not None:
            return self._resolved
        root = os.path.realpath(self._root)
        if os.path.isdir(root):  # noqa: PTH112
            self._resolved = root
        return root

    def _walk(self, directory: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(self._root / directory) as scan:
                entries = [entry for entry in scan if not is_hidden(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return
        # Names sort as whole strings, so "a.txt" precedes "a/b": a directory counts with its slash.
        for entry in sorted(entries, key=_sort_key):
            name = directory + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(name + "/")
                continue
            if entry.is_symlink():
                self._inside(name)
            # Gone since the directory was read, or a link to nothing or to itself: there is no object.
            with contextlib.suppress(FileNotFoundError, InvalidNameError), _name_errors(self.uri + name):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    yield _object_info(name, status)


def _has_link(root: str, relative: str) -> bool:
    """Whether a name, as :func:`check_name` lets it through, has a symbolic link in it or at its end."""
    end = relative.find("/")
    while end >= 0:
        if os.path.islink(os.path.join(root, relative[:end])):  # noqa: PTH114, PTH118
            return True
        end = relative.find("/", end + 1)
    return os.path.islink(os.path.join(root, relative))  # noqa: PTH114, PTH118


def _sort_key(entry: os.DirEntry[str]) -> str:
    return entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name


def _object_info(name: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(
        name=name,
        size=status.st_size,
        identity=f"{status.st_size}-{status.st_mtime_ns}",
        modified=status.st_mtime,
    )


def _regular_file(path: Path) -> os.stat_result:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise NotARegularFileError(f"{path} is a FIFO, a device or a socket; only regular files are read.")
    return status


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _name_errors(uri: str) -> Iterator[None]:
    """Raise what the contract says where the file system has errors of its own for an impossible name."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InvalidNameError(f"{uri} cannot be an object: {error.strerror}.") from error
        raise
