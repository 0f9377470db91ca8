"""Loading media: found below the allowed roots, checked, and made fit for a model.

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

from collections.abc import Callable, Mapping, Sequence
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
from airflow_vlm_provider.types import Media, MediaRef

MAX_BYTES = 64 * 1024 * 1024
# A reference that holds a picture instead of naming one would drown the list of dead letters.
_REPORTED_CHARS = 1000


class MediaLoader:
    """Loads what samples refer to. Safe to use from several threads at once.

    :param source_uri: Where the shards are; what relative references are relative to, by way of their shard.
    :param roots: Where media may be, see :mod:`airflow_vlm_provider.shards.media_roots`; None allows only what
        lies where the shards are.
    :param max_pixels: Shrink larger images to so many pixels (width x height); None leaves them as they are.
    :param s3_client: Makes the boto3 S3 client, called when it is first needed.
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
            uri: open_store(uri, s3_client=s3_client) for uri in self._roots.store_uris
        }
        self._fetch: Callable[[HttpUrl], bytes] | None = None
        if self._roots.allow_http:
            from airflow_vlm_provider.shards.http_media import HttpFetcher

            self._fetch = HttpFetcher(reach=self._roots.reach, max_bytes=max_bytes).fetch

    @property
    def remote(self) -> bool:
        """Whether loading may wait for a network."""
        return self._roots.allow_http or any(uri.startswith("s3:") for uri in self._stores)

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what becomes of an image, as JSON values: part of the fingerprint."""
        return {
            "max_pixels": self._max_pixels,
            "preprocessing": PREPROCESSING_VERSION,
            "roots": self._named_roots,
        }

    def load(self, ref: MediaRef, *, shard: str = "") -> Media:
        """
        Load one image. Blocks on files and networks.

        :param shard: Name of the sample's shard below the source.
        :raises SampleError: see the module's table.
        :raises TransientError: it could not be read this time.
        """
        try:
            if not isinstance(ref.ref, str):
                raise SampleError(
                    "media_refused", f"The reference is a {type(ref.ref).__name__}, not a string."
                )
            if ref.kind != "image":
                raise SampleError(
                    "media_unsupported", f"{shown(ref.ref)} is a {ref.kind}; only images can be loaded."
                )
            folder = shard.rpartition("/")[0]
            data = self._read_first(self._roots.places(ref.ref, source=self._source, folder=folder), ref.ref)
            mime, data = fit_image(data, max_pixels=self._max_pixels)
        except SampleError as error:
            error.media = _reported(ref.ref)
            raise
        return Media(kind="image", mime=mime, data=data, ref=ref.ref)

    def _read_first(self, places: Sequence[StoredMedia | HttpUrl], ref: str) -> bytes:
        absent: SampleError | None = None
        for place in places:
            try:
                return self._read(place)
            except SampleError as error:
                # S3 denies what does not exist to those who may not list the bucket: look further then, too.
                if error.kind not in ("media_missing", "media_unreadable"):
                    raise
                absent = error if absent is None or absent.kind == "media_missing" else absent
        assert absent is not None
        if len(places) == 1:
            raise absent
        looked = ", ".join(shown(str(place)) for place in places[:3]) + (", ..." if len(places) > 3 else "")
        raise SampleError(absent.kind, f"{shown(ref)}: {absent.message} Looked for {looked}.") from absent

    def _read(self, place: StoredMedia | HttpUrl) -> bytes:
        if isinstance(place, HttpUrl):
            assert self._fetch is not None
            return self._fetch(place)
        return self._read_stored(place, follow=True)

    def _read_stored(self, place: StoredMedia, *, follow: bool) -> bytes:
        try:
            return self._stores[place.root].read(place.name, max_bytes=self._max_bytes)
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

    def _sample_error(self, what: str, error: Exception) -> SampleError:
        if isinstance(error, ObjectTooLargeError):
            return SampleError(
                "media_too_large", f"{what} has more than the {self._max_bytes:,} bytes that are taken."
            )
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


def _reported(ref: object) -> str:
    text = ref if isinstance(ref, str) else repr(ref)
    return text if len(text) <= _REPORTED_CHARS else f"{text[:_REPORTED_CHARS]}... ({len(text)} characters)"
