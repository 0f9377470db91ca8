"""Loading media: found below the allowed roots, checked, and made fit for a model.

Two halves. :meth:`MediaLoader.fetch` finds and reads a file, and says by its SHA-256 which it is: an answer about
it is known by that, whatever is made of the file afterwards. :meth:`MediaLoader.prepare` makes it fit for a model.
Everything that ``fetch`` looked at for a reference is written down with the identity that its store gave it, and
:meth:`MediaLoader.identities` tells the same identities again without reading a file: as long as they are the same,
the reference means the same bytes, or the same absence of any.

What can't be loaded becomes its sample's error, of one of these kinds:

=====================  =====================================================================================
kind                   meaning
=====================  =====================================================================================
``media_refused``      the reference leads out of the roots, or nowhere that is ever read
``media_missing``      there is no such file, object or URL
``media_unreadable``   it is (or may be) there, but access is denied or the answer is not the file
``media_too_large``    more bytes or more pixels than are taken
``media_corrupt``      cut short, damaged, or no image at all
``media_unsupported``  a known kind of file that is not decoded here; videos among them
``transient``          a time-out, a reset connection, a 5xx: not the sample's fault, asked again by the next run
=====================  =====================================================================================

The limits: :data:`MAX_BYTES` per file, and :data:`~airflow_vlm_provider.shards.images.MAX_DECODED_PIXELS`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from typing import Any

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.shards.http_urls import HttpUrl
from airflow_vlm_provider.shards.images import PREPROCESSING_VERSION, fit_image
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
from airflow_vlm_provider.types import FrameSampling, Media, MediaRef, Part, SourceMedia

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024 * 1024
VIDEO_VERSION = 1
# A reference that holds a picture instead of naming one would drown the list of dead letters.
_REPORTED_CHARS = 1000
# The identity of a FIFO, or of a link to where nothing may be read: where a search ends, unlike where nothing is.
_REFUSED = "refused"
# Requests at once where every file has to be asked for by itself.
_STAT_THREADS = 16
_STAT_BATCH = 1000


class MediaLoader:
    """Loads what samples refer to. Safe to use from several threads at once.

    :param source_uri: Where the shards are; what relative references are relative to, by way of their shard.
    :param roots: Where media may be, see :mod:`airflow_vlm_provider.shards.media_roots`; None allows only what
        lies where the shards are.
    :param max_pixels: Shrink larger images to so many pixels (width x height); None leaves them as they are.
    :param s3_client: Makes the boto3 S3 client, called when it is first needed.
    :param filesystem: Makes the fsspec file system for a root of another scheme; see
        :func:`~airflow_vlm_provider.shards.opening.open_store`.
    :param max_bytes: Most bytes that one file may have.
    :raises ConfigError: a root is malformed or never read, or a limit is below 1.
    """

    def __init__(
        self,
        *,
        source_uri: str,
        roots: Sequence[str] | None = None,
        max_pixels: int | None = None,
        s3_client: Callable[[], Any] | None = None,
        filesystem: Callable[[str], Any] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(
                f"max_pixels={max_pixels} must be at least 1, or None to keep images as they are."
            )
        self._source = source_uri.rstrip("/") + "/"
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        # They decide which file a relative reference means; where the shards are does not, so a moved dataset is known.
        self._named_roots = None if roots is None else list(roots)
        self._roots = MediaRoots([source_uri] if roots is None else roots)
        self._stores: dict[str, Store] = {
            uri: open_store(uri, s3_client=s3_client, filesystem=filesystem) for uri in self._roots.store_uris
        }
        self._fetch_url: Callable[[HttpUrl], bytes] | None = None
        if self._roots.allow_http:
            from airflow_vlm_provider.shards.http_media import HttpFetcher

            self._fetch_url = HttpFetcher(reach=self._roots.reach, max_bytes=max_bytes).fetch

    @property
    def remote(self) -> bool:
        """Whether loading may wait for a network."""
        return self._roots.allow_http or not all(uri.startswith("file:") for uri in self._stores)

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what becomes of an image, as JSON values: part of the fingerprint."""
        return {**self.answering_parameters(), "roots": self._named_roots}

    def answering_parameters(self) -> Mapping[str, Any]:
        """What decides what a model is shown of given bytes, as JSON values: part of every request's key."""
        return {"max_pixels": self._max_pixels, "preprocessing": PREPROCESSING_VERSION}

    def video_parameters(self) -> Mapping[str, Any]:
        """What of :meth:`answering_parameters` concerns videos alone."""
        return {"preprocessing": VIDEO_VERSION}

    def memory_parameters(self) -> Mapping[str, Any]:
        """What must be the same for what was found out about a shard's media to hold again, as JSON values.

        With other roots, or the shards elsewhere, a reference may mean another file even if nothing has changed
        where it was looked for before.
        """
        return {**self.parameters(), "source": self._source, "max_bytes": self._max_bytes}

    def fetch(
        self, ref: MediaRef, *, shard: str = "", embedded: Mapping[str, bytes] | None = None
    ) -> SourceMedia:
        """
        Find and read one image's file, without a look at what is in it. Blocks on files and networks.

        :param shard: Name of the sample's shard below the source.
        :param embedded: Media that the shard holds itself, by reference. Such a reference is looked for nowhere else.
        :raises SampleError: see the module's table. Its ``looked`` tells what was looked at in vain.
        :raises TransientError: it could not be read this time.
        """
        looked: list[tuple[str, str | None]] = []
        try:
            if not isinstance(ref.ref, str):
                raise SampleError(
                    "media_refused", f"The reference is a {type(ref.ref).__name__}, not a string."
                )
            if ref.kind != "image":
                raise SampleError(
                    "media_unsupported", f"{shown(ref.ref)} is a {ref.kind}; only images can be loaded."
                )
            if embedded is not None and ref.ref in embedded:
                data = self._within_limit(embedded[ref.ref], ref.ref)
            else:
                folder = shard.rpartition("/")[0]
                places = self._roots.places(ref.ref, source=self._source, folder=folder)
                data = self._read_first(places, ref.ref, looked)
        except SampleError as error:
            error.media, error.looked = _reported(ref.ref), tuple(looked)
            raise
        digest = hashlib.sha256(data).hexdigest()
        return SourceMedia(kind=ref.kind, ref=ref.ref, data=data, digest=digest, looked=tuple(looked))

    def prepare(
        self, source: SourceMedia, *, frames: FrameSampling | None = None, as_video: bool = False
    ) -> Sequence[Part]:
        """
        Make an image or a video fit for a model: checked, upright, small enough. Takes a CPU's time and waits for
        nothing.

        :param frames: Of a video, which frames.
        :param as_video: Of a video: as one video; else its frames as images, and a text that says so.
        :return: What stands in the message in its place.
        :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
        """
        try:
            mime, data = fit_image(source.data, max_pixels=self._max_pixels)
        except SampleError as error:
            error.media, error.looked = _reported(source.ref), source.looked
            raise
        return (Media(kind=source.kind, mime=mime, data=data, ref=source.ref),)

    def probe(self, source: SourceMedia) -> Mapping[str, Any]:
        """
        Tell what a video file is like; see :class:`~airflow_vlm_provider.types.Probe`.

        :raises SampleError: ``media_corrupt`` or ``media_unsupported``.
        """
        raise NotImplementedError

    def identities(self, uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """
        Tell what is there now where :meth:`fetch` looked, by listing: not with one request for every file.

        :param uris: URIs out of ``looked``, sorted, each once; consumed as they are answered.
        :return: Each URI, in order, with its identity as in ``looked``; None also for what is below no root any more.
        :raises ConnectionError: A store can't be reached even after retries.
        :raises StoreError: A store answers something else than its contract knows.
        """
        for root, group in groupby(uris, key=self._root_of):
            if root is None:
                http = self._roots.allow_http
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
            target = self._roots.behind_link(place) if follow else None
            return _REFUSED if target is None else self._identity(target, follow=False)
        except (NotARegularFileError, InvalidNameError):
            return _REFUSED
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            return None

    def _read_first(
        self, places: Sequence[StoredMedia | HttpUrl], ref: str, looked: list[tuple[str, str | None]]
    ) -> bytes:
        absent: SampleError | None = None
        for place in places:
            try:
                data, identity = self._read(place)
            except SampleError as error:
                looked.append((str(place), self._identity_of_failed(place, error)))
                # S3 denies what does not exist to those who may not list the bucket: look further then, too.
                if error.kind not in ("media_missing", "media_unreadable"):
                    raise
                absent = error if absent is None or absent.kind == "media_missing" else absent
            else:
                looked.append((str(place), identity))
                return data
        assert absent is not None
        if len(places) == 1:
            raise absent
        tried = ", ".join(shown(str(place)) for place in places[:3]) + (", ..." if len(places) > 3 else "")
        raise SampleError(absent.kind, f"{shown(ref)}: {absent.message} Looked for {tried}.") from absent

    def _read(self, place: StoredMedia | HttpUrl) -> tuple[bytes, str]:
        """Return a file's bytes and their identity."""
        if isinstance(place, HttpUrl):
            assert self._fetch_url is not None
            return self._fetch_url(place), ""
        return self._read_stored(place, follow=True)

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

    def _read_stored(self, place: StoredMedia, *, follow: bool) -> tuple[bytes, str]:
        try:
            data, info = self._stores[place.root].fetch(place.name, max_bytes=self._max_bytes)
        except OutsideRootError as error:
            # A store knows only its own root; a link into another allowed one is no escape.
            target = self._roots.behind_link(place) if follow else None
            if target is None:
                raise SampleError(
                    "media_refused",
                    f"{shown(str(place))} leads out of its root by a symbolic link. "
                    "If the dataset may read the link's target, add the target's folder to media_roots.",
                ) from error
            return self._read_stored(target, follow=False)
        except (StoreError, OSError, UnicodeError) as error:
            raise self._sample_error(shown(str(place)), error) from error
        return data, info.identity

    def _within_limit(self, data: bytes, ref: str) -> bytes:
        if len(data) > self._max_bytes:
            raise self._too_large(f"{shown(ref)}, embedded in the shard,")
        return data

    def _too_large(self, what: str) -> SampleError:
        return SampleError(
            "media_too_large", f"{what} has more than the {self._max_bytes:,} bytes that are taken."
        )

    def _sample_error(self, what: str, error: Exception) -> SampleError:
        if isinstance(error, ObjectTooLargeError):
            return self._too_large(what)
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


def _reported(ref: object) -> str:
    text = ref if isinstance(ref, str) else repr(ref)
    return text if len(text) <= _REPORTED_CHARS else f"{text[:_REPORTED_CHARS]}... ({len(text)} characters)"
