"""Finding media below the allowed roots, and telling later whether the same is still there.

Images and videos are found on the same ways and refused for the same reasons; they only differ in how a file is read
once it is found, which is what a :class:`Reading` is about.

Invariant: everything that was looked at for a reference is written down with the identity that its store gave it, and
:meth:`MediaFiles.identities` tells the same identities again without reading a file.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from typing import Any, Protocol, TypeVar

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.http_urls import HttpUrl
from airflow_vlm_provider.shards.media_roots import MediaRoots, StoredMedia, shown
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    NotARegularFileError,
    ObjectTooLargeError,
    OutsideRootError,
    Store,
    StoreError,
)

log = logging.getLogger(__name__)

# The identity of a FIFO, or of a link to where nothing may be read: where a search ends, unlike where nothing is.
_REFUSED = "refused"
# Requests at once where every file has to be asked for by itself.
_STAT_THREADS = 16
_STAT_BATCH = 1000

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Reading(Protocol[T_co]):
    """How a file is read once it is found. Safe to use from several threads at once."""

    @property
    def max_bytes(self) -> int:
        """Most bytes that a file may have."""

    def read_stored(self, store: Store, name: str) -> tuple[T_co, str]:
        """
        Read an object; return it with its identity.

        :raises StoreError, OSError: as the store says.
        """

    def read_url(self, url: HttpUrl) -> T_co:
        """
        Read what a URL answers.

        :raises SampleError: it can't be had.
        """


class MediaFiles:
    """The files below some roots. Safe to use from several threads at once.

    :param source_uri: Where the shards are, with a trailing slash.
    :param roots: Where media may be.
    :param s3_client: Makes the boto3 S3 client, called when it is first needed.
    :param filesystem: Makes the fsspec file system for a root of another scheme.
    :raises ConfigError: a root is malformed or never read.
    """

    def __init__(
        self,
        *,
        source_uri: str,
        roots: Sequence[str],
        s3_client: Callable[[], Any] | None = None,
        filesystem: Callable[[str], Any] | None = None,
    ) -> None:
        self._source = source_uri
        self.roots = MediaRoots(roots)
        self._stores: dict[str, Store] = {
            uri: open_store(uri, s3_client=s3_client, filesystem=filesystem) for uri in self.roots.store_uris
        }

    @property
    def remote(self) -> bool:
        """Whether reading may wait for a network."""
        return self.roots.allow_http or not all(uri.startswith("file:") for uri in self._stores)

    def find(self, ref: str, reading: Reading[T], *, folder: str, looked: list[tuple[str, str | None]]) -> T:
        """
        Find a file and read it. Blocks on files and networks.

        :param folder: Name of the shard's folder below the source.
        :param looked: Takes what was looked at, see :data:`~airflow_vlm_provider.types.Looked`.
        :raises SampleError: ``media_refused``, ``media_missing``, ``media_unreadable`` or ``media_too_large``.
        :raises TransientError: it could not be read this time.
        """
        absent: SampleError | None = None
        places = self.roots.places(ref, source=self._source, folder=folder)
        for place in places:
            try:
                found, identity = self._read(place, reading)
            except SampleError as error:
                looked.append((str(place), self._identity_of_failed(place, error)))
                # S3 denies what does not exist to those who may not list the bucket: look further then, too.
                if error.kind not in ("media_missing", "media_unreadable"):
                    raise
                absent = error if absent is None or absent.kind == "media_missing" else absent
            else:
                looked.append((str(place), identity))
                return found
        assert absent is not None
        if len(places) == 1:
            raise absent
        tried = ", ".join(shown(str(place)) for place in places[:3]) + (", ..." if len(places) > 3 else "")
        raise SampleError(absent.kind, f"{shown(ref)}: {absent.message} Looked for {tried}.") from absent

    def identities(self, uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """
        Tell what is there now where :meth:`find` looked, by listing: not with one request for every file.

        :param uris: URIs out of ``looked``, sorted, each once; consumed as they are answered.
        :return: Each URI, in order, with its identity as in ``looked``; None also for what is below no root any more.
        :raises ConnectionError: A store can't be reached even after retries.
        :raises StoreError: A store answers something else than its contract knows.
        """
        for root, group in groupby(uris, key=self._root_of):
            if root is None:
                http = self.roots.allow_http
                yield from ((uri, "" if http and _is_http(uri) else None) for uri in group)
                continue
            names = (uri[len(root) :] for uri in group)
            yield from ((root + name, identity) for name, identity in self._identities_below(root, names))

    def _root_of(self, uri: str) -> str | None:
        return next((root for root in self._stores if uri.startswith(root)), None)

    def _identities_below(self, root: str, names: Iterator[str]) -> Iterator[tuple[str, str | None]]:
        waiting: deque[str] = deque()

        def noted() -> Iterator[str]:
            for name in names:
                waiting.append(name)
                yield name

        try:
            for name, info in self._stores[root].stat_many(noted()):
                waiting.popleft()
                yield name, self._identity_of_no_object(root, name) if info is None else info.identity
        except FileNotFoundError:
            # The whole bucket is gone.
            yield from ((name, None) for name in chain(waiting, names))
        except PermissionError as error:
            # Who may read objects may not always list them.
            log.warning("%s may not be listed, so its files are looked up one by one (%s)", root, error)
            rest = chain(waiting, names)
            with ThreadPoolExecutor(_STAT_THREADS, thread_name_prefix="vlm-stat") as threads:
                while batch := [StoredMedia(root, name) for name in islice(rest, _STAT_BATCH)]:
                    yield from zip(
                        (place.name for place in batch), threads.map(self._identity, batch), strict=True
                    )

    def _identity_of_no_object(self, root: str, name: str) -> str | None:
        # A store knows of no object where a link leads into another root, and tells nothing from what is no file.
        if root.startswith("file:") and os.path.lexists(root.removeprefix("file://") + name):
            return self._identity(StoredMedia(root, name))
        return None

    def _identity(self, place: StoredMedia, *, follow: bool = True) -> str | None:
        """Look one file up, on the ways that :meth:`_read_stored` goes."""
        try:
            return self._stores[place.root].stat(place.name).identity
        except OutsideRootError:
            target = self.roots.behind_link(place) if follow else None
            return _REFUSED if target is None else self._identity(target, follow=False)
        except (NotARegularFileError, InvalidNameError):
            return _REFUSED
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            return None

    def _read(self, place: StoredMedia | HttpUrl, reading: Reading[T]) -> tuple[T, str]:
        if isinstance(place, HttpUrl):
            return reading.read_url(place), ""
        return self._read_stored(place, reading, follow=True)

    def _identity_of_failed(self, place: StoredMedia | HttpUrl, error: SampleError) -> str | None:
        """The identity of what could not be read, as :meth:`identities` tells it."""
        uri = str(place)
        # What S3 does not have need not be asked for once more.
        if not _is_http(uri) and not uri.startswith("file:") and error.kind == "media_missing":
            return None
        try:
            return next(self.identities([uri]))[1]
        except (StoreError, OSError):
            return None

    def _read_stored(self, place: StoredMedia, reading: Reading[T], *, follow: bool) -> tuple[T, str]:
        try:
            return reading.read_stored(self._stores[place.root], place.name)
        except OutsideRootError as error:
            # A store knows only its own root; a link into another allowed one is no escape.
            target = self.roots.behind_link(place) if follow else None
            if target is None:
                raise SampleError(
                    "media_refused",
                    f"{shown(str(place))} leads out of its root by a symbolic link. "
                    "If the dataset may read the link's target, add the target's folder to media_roots.",
                ) from error
            return self._read_stored(target, reading, follow=False)
        except (StoreError, OSError, UnicodeError) as error:
            raise _sample_error(shown(str(place)), error, reading.max_bytes) from error


def too_large(what: str, max_bytes: int) -> SampleError:
    """Say that a file has too many bytes."""
    return SampleError("media_too_large", f"{what} has more than the {max_bytes:,} bytes that are taken.")


def _sample_error(what: str, error: Exception, max_bytes: int) -> SampleError:
    if isinstance(error, ObjectTooLargeError):
        return too_large(what, max_bytes)
    if isinstance(error, (InvalidNameError, UnicodeError)):
        return SampleError("media_refused", f"{what} cannot be the name of a file or an object.")
    if isinstance(error, NotARegularFileError):
        return SampleError("media_refused", f"{what} is a FIFO, a device or a socket, not a file.")
    if isinstance(error, IsADirectoryError):
        return SampleError("media_missing", f"{what} is a folder, not a file.")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return SampleError("media_missing", f"{what} does not exist.")
    if isinstance(error, PermissionError):
        return SampleError("media_unreadable", f"{what} may not be read: {error.strerror}.")
    if isinstance(error, OSError):
        return TransientError(f"{what} could not be read this time: {str(error)[:300]}")
    return SampleError("media_unreadable", f"{what} can't be read: {str(error)[:300]}")


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))
