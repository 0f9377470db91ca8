"""Stores: where shards and media live. One contract for a local directory, an S3 prefix and other object stores.

A store is a root and the objects below it, each known by its name relative to the root. No name, and no
symbolic link, leads out of the root. URIs are taken literally, as S3 and fsspec do: nothing in them is
percent-decoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from airflow_vlm_provider.errors import ConfigError, VLMError

# Schemes of object stores: what follows is a bucket, folders are but a part of names, and a put is atomic.
BUCKET_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "cos", "obs", "tos"})
_SCHEME = re.compile("[a-z][a-z0-9+.-]*")
_OTHER_SCHEMES = {
    "s3a": "write s3:// instead",
    "s3n": "write s3:// instead",
    "local": "write file:/// instead",
    "http": "only media are read over HTTP, by a root in media_roots",
    "https": "only media are read over HTTP, by a root in media_roots",
}


class StoreError(VLMError):
    """A store refused, or could not keep a promise of its contract."""


class InvalidNameError(StoreError, ValueError):
    """The name cannot be an object's: an empty or ``.`` component, backslash, NUL, not Unicode, too long."""


class OutsideRootError(InvalidNameError):
    """The name, or a symbolic link on its way, leads out of the store's root."""


class NotARegularFileError(StoreError, OSError):
    """The name is a FIFO, a device or a socket: opening one could block for ever or have side effects."""


class ObjectTooLargeError(StoreError):
    """The object has more bytes than the caller is ready to take."""


class ObjectChangedError(StoreError, OSError):
    """The object was replaced or deleted while it was being read; what was read of it so far is of no use."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's listing entry.

    :param name: Name relative to the store's root, components separated by ``/``.
    :param size: Size in bytes.
    :param identity: Differs whenever the content was replaced: ETag and size on S3, size and modification
        time on a local disk, whichever of these a file system of another kind tells. Only for comparing with another
        identity of the same store. Where it is a time, it is as fine as the file system's clock.
    :param modified: When it was last written, in seconds since 1970; 0.0 where the storage does not say.
    """

    name: str
    size: int
    identity: str
    modified: float = field(default=0.0, compare=False)


class Store(Protocol):
    """Objects below a root. Safe to use from several threads at once.

    Every method that takes a name raises :class:`InvalidNameError` (:class:`OutsideRootError` when the name
    would leave the root). Every method raises ``FileNotFoundError`` when what it reads is not there,
    ``PermissionError`` when access is denied, ``ConnectionError`` when the storage cannot be reached even
    after retries, and :class:`StoreError` for anything else that the storage answers.
    """

    @property
    def uri(self) -> str:
        """The root, normalised and with a trailing slash: ``s3://bucket/prefix/``, ``file:///data/images/``."""

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        """
        Yield every object below the root, or below a folder of it, sorted by name (which is relative to the root).

        Names with a component that begins with ``_`` or ``.`` are no data and are left out (Hive's and
        Spark's convention), not counting the components of ``folder`` itself. What does not exist has no objects; only
        a bucket that does not exist may be told by ``FileNotFoundError``.

        :param folder: Name of the folder, without a trailing slash; empty for the root.
        :raises OutsideRootError: A symbolic link leads out of the root.
        """

    def stat(self, name: str) -> ObjectInfo:
        """
        Look one object up.

        :raises IsADirectoryError: The name is a directory's, where the storage has such things.
        """

    def stat_many(self, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        """
        Look many objects up, as :meth:`stat` would, with as few requests as listing their folders takes.

        :param names: Names, sorted, each at most once; consumed as they are answered.
        :return: Each name with its entry, in order; None where there is no such object, a directory has the name,
            or no object can have it.
        :raises ValueError: (when it is reached) A name does not come after the one before it.
        """

    def open(self, name: str) -> BinaryIO:
        """
        Open an object as a buffered stream to be read from its beginning to its end; the caller closes it.

        A stream never ends early: it delivers all bytes of one version of the object, or raises.

        :raises IsADirectoryError: The name is a directory's.
        :raises ObjectChangedError: (when reading) the object was replaced or deleted in the meantime.
        """

    def open_version(self, name: str) -> tuple[BinaryIO, ObjectInfo]:
        """
        Open an object as :meth:`open` does, and return the entry of the very version that is read.

        A local file that somebody writes to in place is only noticed by a look at its status after reading.
        """

    def open_seekable(self, name: str) -> BinaryIO:
        """
        Open an object for reading here and there, unbuffered; the caller closes it.

        Each read is a request where the storage is remote, and fills what it reads into unless the object ends. All
        reads are of the version that was there when it was opened; otherwise :meth:`open`'s promises hold.
        """

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """
        Return a whole small object: the first of what :meth:`fetch` returns.
        """

    def fetch(self, name: str, *, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """
        Return a whole small object, and the entry of the very version that the bytes are of.

        :param max_bytes: Most bytes to take; a larger object is refused before more than that is transferred.
        :raises ObjectTooLargeError: The object is larger than ``max_bytes``.
        :raises IsADirectoryError: The name is a directory's.
        """

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """
        Write an object, whole or not at all.

        The object becomes visible, replacing any earlier one, when the body ends normally; when the body
        raises, nothing becomes visible and nothing is left over. Of two writers at once the last to finish
        wins whole. A writer that is killed leaves at most what no listing shows.
        """

    def delete(self, name: str) -> None:
        """Remove an object; it is no error when there is none, or a directory has the name."""


def split_uri(uri: str) -> tuple[str, str, str]:
    """
    Split a store's or an object's URI.

    :return: ``("s3", bucket, key)``, ``("file", "", absolute path)``, or of any other scheme the same three parts:
        ``("gs", bucket, key)``. An Airflow connection that the URI names stays in the second:
        ``("gs", "connection@bucket", key)``.
    :raises ConfigError: The URI is malformed or incomplete, or never names a store.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri:
            raise ConfigError(
                "An empty URI names no place; give s3://bucket/prefix, file:///path or a local path."
            )
        return "file", "", os.path.abspath(uri)  # noqa: PTH100  Path.absolute() keeps ".."
    scheme = scheme.lower()
    authority, slash, path = rest.partition("/")
    if scheme == "file":
        if authority not in ("", "localhost") or not slash:
            raise ConfigError(
                f"{uri!r} is not a path on this machine; write file:///path, with three slashes."
            )
        return "file", "", os.path.abspath("/" + path)  # noqa: PTH100
    user, _, host = authority.rpartition("@")
    if ":" in user:
        raise ConfigError(
            f"The URI {scheme}://***@{host}/{path} holds a password. Put it in an Airflow connection, and name that "
            "by storage_conn_id."
        )
    if not _SCHEME.fullmatch(scheme) or scheme in _OTHER_SCHEMES:
        remedy = _OTHER_SCHEMES.get(scheme, "write s3://bucket/prefix, file:///path or a local path")
        raise ConfigError(f"{uri!r} has the scheme {scheme!r}, which names no store of shards; {remedy}.")
    if scheme == "s3" and user:
        raise ConfigError(f"{uri!r} names a connection before its bucket; give it by aws_conn_id instead.")
    if not host and (scheme in BUCKET_SCHEMES or not path):
        raise ConfigError(f"{uri!r} names no bucket; write {scheme}://bucket/prefix.")
    return scheme, authority, path


def is_same_authority(one: str, other: str) -> bool:
    """
    Tell whether the second parts that :func:`split_uri` returns for two URIs of a scheme can mean one bucket.

    They do when the bucket has the same name and they do not name different connections: on Azure, two storage
    accounts may each have a container of the name.
    """
    user, _, host = one.rpartition("@")
    other_user, _, other_host = other.rpartition("@")
    return host == other_host and (user == other_user or not user or not other_user)


def check_name(name: str) -> None:
    """
    Check that a name stays below any root when it is appended to it.

    :raises InvalidNameError: It cannot be an object's name.
    :raises OutsideRootError: It is absolute or has a ``..`` component.
    """
    components = name.split("/")
    if name.startswith("/") or ".." in components:
        raise OutsideRootError(
            f"The name {name!r} leads out of its store; give one below its root, without '..'."
        )
    if "" in components or "." in components or "\\" in name or "\0" in name:
        raise InvalidNameError(
            f"{name!r} cannot be an object's name; separate its parts by one '/', without '.', '\\' or NUL."
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidNameError(f"{name!r} cannot be an object's name: it is not valid Unicode.") from None


def in_order(names: Iterable[str]) -> Iterator[str]:
    """
    Pass names on that come sorted.

    :raises ValueError: One does not come after the one before it.
    """
    before = None
    for name in names:
        if before is not None and name <= before:
            raise ValueError(f"Names have to be sorted and different, but {name!r} came after {before!r}.")
        before = name
        yield name


def is_hidden(name: str) -> bool:
    """Tell whether a component of the name begins with ``_`` or ``.``: it is then no data."""
    return any(component.startswith(("_", ".")) for component in name.split("/"))
