"""Loading media: found below the allowed roots, checked, and made fit for a model.

Two halves. :meth:`MediaLoader.fetch` finds and reads a file, and says by its SHA-256 which it is: an answer about
it is known by that, whatever is made of the file afterwards. :meth:`MediaLoader.prepare` makes it fit for a model.
Everything that ``fetch`` looked at for a reference is written down with the identity that its store gave it, and
:meth:`MediaLoader.identities` tells the same identities again without reading a file: as long as they are the same,
the reference means the same bytes, or the same absence of any.

What can't be loaded becomes its sample's error, of one of these kinds:

=====================  =================================================================================================
kind                   meaning
=====================  =================================================================================================
``media_refused``      the reference leads out of the roots, or nowhere that is ever read; or the video itself refers to
                       another file
``media_missing``      there is no such file, object or URL
``media_unreadable``   it is (or may be) there, but access is denied or the answer is not the file
``media_too_large``    more bytes or more pixels than are taken; of a video, too much to decode for a few frames
``media_corrupt``      empty, cut short, damaged, or no image or video at all; nothing of the video in the time asked for
``media_unsupported``  a known kind of file that is not decoded here: sound alone, an image where a video is expected, ...
``transient``          a time-out, a reset connection, a 5xx: not the sample's fault, asked again by the next run
=====================  =================================================================================================

The limits: :data:`MAX_BYTES` of an image's file and :data:`~airflow_vlm_provider.shards.video_files.MAX_VIDEO_BYTES` of
a video's, and for both :data:`~airflow_vlm_provider.shards.images.MAX_DECODED_PIXELS` of a picture.

An image is held in memory, a video is not: it stays an open file, see :mod:`airflow_vlm_provider.shards.video_files`,
and what becomes of it is in :mod:`airflow_vlm_provider.shards.videos`. A worker without room for one fails the task, with
:class:`~airflow_vlm_provider.shards.video_files.SpoolError`, as that is no sample's fault.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.shards.images import PREPROCESSING_VERSION, fit_image
from airflow_vlm_provider.shards.media_files import MediaFiles, Reading, too_large
from airflow_vlm_provider.shards.media_roots import shown
from airflow_vlm_provider.shards.video_files import MAX_VIDEO_BYTES, VideoReading
from airflow_vlm_provider.shards.videos import VIDEO_VERSION, prepare_video, probe_video
from airflow_vlm_provider.types import FrameSampling, Media, MediaRef, Part, SourceMedia

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.http_media import HttpFetcher
    from airflow_vlm_provider.shards.http_urls import HttpUrl
    from airflow_vlm_provider.shards.stores import Store

MAX_BYTES = 64 * 1024 * 1024
# A reference that holds a picture instead of naming one would drown the list of dead letters.
_REPORTED_CHARS = 1000

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class MediaLoader:
    """Loads what samples refer to. Safe to use from several threads at once.

    :param source_uri: Where the shards are; what relative references are relative to, by way of their shard.
    :param roots: Where media may be, see :mod:`airflow_vlm_provider.shards.media_roots`; None allows only what
        lies where the shards are.
    :param max_pixels: Shrink larger images to so many pixels (width x height); None leaves them as they are.
    :param s3_client: Makes the boto3 S3 client, called when it is first needed.
    :param filesystem: Makes the fsspec file system for a root of another scheme; see
        :func:`~airflow_vlm_provider.shards.opening.open_store`.
    :param max_bytes: Most bytes that an image's file may have.
    :param max_video_bytes: Most bytes that a video's file may have.
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
        max_video_bytes: int = MAX_VIDEO_BYTES,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(
                f"max_pixels={max_pixels} must be at least 1, or None to keep images as they are."
            )
        self._source = source_uri.rstrip("/") + "/"
        self._max_pixels = max_pixels
        # They decide which file a relative reference means; where the shards are does not, so a moved dataset is known.
        self._named_roots = None if roots is None else list(roots)
        self._files = MediaFiles(
            source_uri=self._source,
            roots=[source_uri] if roots is None else roots,
            s3_client=s3_client,
            filesystem=filesystem,
        )
        fetcher = video_fetcher = None
        if self._files.roots.allow_http:
            from airflow_vlm_provider.shards.http_media import HttpFetcher

            reach = self._files.roots.reach
            fetcher = HttpFetcher(reach=reach, max_bytes=max_bytes)
            video_fetcher = HttpFetcher.for_videos(reach=reach, max_bytes=max_video_bytes)
        self._images = _ImageReading(max_bytes=max_bytes, fetcher=fetcher)
        self._videos = VideoReading(max_bytes=max_video_bytes, fetcher=video_fetcher)

    @property
    def remote(self) -> bool:
        """Whether loading may wait for a network."""
        return self._files.remote

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
        return {
            **self.parameters(),
            "source": self._source,
            "max_bytes": self._images.max_bytes,
            "max_video_bytes": self._videos.max_bytes,
        }

    def fetch(
        self, ref: MediaRef, *, shard: str = "", embedded: Mapping[str, bytes] | None = None
    ) -> SourceMedia:
        """
        Find and read the file of an image or a video, without a look at what is in it. Blocks on files and networks.

        :param shard: Name of the sample's shard below the source.
        :param embedded: Media that the shard holds itself, by reference. Such a reference is looked for nowhere else.
        :raises SampleError: see the module's table. Its ``looked`` tells what was looked at in vain.
        :raises TransientError: it could not be read this time.
        :raises SpoolError: there is no room on this machine for a video.
        """
        looked: list[tuple[str, str | None]] = []
        try:
            if not isinstance(ref.ref, str):
                raise SampleError(
                    "media_refused", f"The reference is a {type(ref.ref).__name__}, not a string."
                )
            if ref.kind == "video":
                file = self._find(ref.ref, self._videos, shard, embedded, looked)
                return SourceMedia("video", ref.ref, b"", file.digest, tuple(looked), file)
            data = self._find(ref.ref, self._images, shard, embedded, looked)
        except SampleError as error:
            error.media, error.looked = _reported(ref.ref), tuple(looked)
            raise
        return SourceMedia("image", ref.ref, data, hashlib.sha256(data).hexdigest(), tuple(looked))

    def prepare(
        self, source: SourceMedia, *, frames: FrameSampling | None = None, as_video: bool = False
    ) -> Sequence[Part]:
        """
        Make an image or a video fit for a model: checked, upright, small enough. Takes a CPU's time and waits for
        nothing but its turn.

        :param frames: Of a video, which frames.
        :param as_video: Of a video: as one video; else its frames as images, and a text that says so.
        :return: What stands in the message in its place.
        :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
        :raises TransientError: a video's file was written to since it was fetched, or could not be read.
        :raises ConfigError: what decodes videos is not installed.
        """
        with _blamed(source):
            if source.kind == "video":
                if frames is None:
                    raise ValueError(
                        f"{shown(source.ref)} is a video, and which of its frames to take is not said."
                    )
                return prepare_video(
                    source.file, ref=source.ref, frames=frames, as_video=as_video, max_pixels=self._max_pixels
                )
            mime, data = fit_image(source.data, max_pixels=self._max_pixels)
        return (Media(kind="image", mime=mime, data=data, ref=source.ref),)

    def probe(self, source: SourceMedia) -> Mapping[str, Any]:
        """
        Tell what a video file is like; see :class:`~airflow_vlm_provider.types.Probe`.

        :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
        :raises TransientError: the file was written to since it was fetched, or could not be read.
        :raises ConfigError: what decodes videos is not installed.
        """
        with _blamed(source):
            return probe_video(source.file)

    def identities(self, uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """
        Tell what is there now where :meth:`fetch` looked; see :meth:`.media_files.MediaFiles.identities`.
        """
        return self._files.identities(uris)

    def _find(
        self,
        ref: str,
        reading: _EmbeddedReading[T],
        shard: str,
        embedded: Mapping[str, bytes] | None,
        looked: list[tuple[str, str | None]],
    ) -> T:
        if embedded is None or ref not in embedded:
            return self._files.find(ref, reading, folder=shard.rpartition("/")[0], looked=looked)
        data = embedded[ref]
        if len(data) > reading.max_bytes:
            raise too_large(f"{shown(ref)}, embedded in the shard,", reading.max_bytes)
        return reading.read_embedded(data)


class _EmbeddedReading(Reading[T_co], Protocol[T_co]):
    """How a file is read, be it found somewhere or in the shard itself."""

    def read_embedded(self, data: bytes) -> T_co: ...


class _ImageReading:
    """Reads images into memory."""

    def __init__(self, *, max_bytes: int, fetcher: HttpFetcher | None) -> None:
        self.max_bytes = max_bytes
        self._fetcher = fetcher

    def read_stored(self, store: Store, name: str) -> tuple[bytes, str]:
        data, info = store.fetch(name, max_bytes=self.max_bytes)
        return data, info.identity

    def read_url(self, url: HttpUrl) -> bytes:
        assert self._fetcher is not None
        return self._fetcher.fetch(url)

    def read_embedded(self, data: bytes) -> bytes:
        return data


@contextlib.contextmanager
def _blamed(source: SourceMedia) -> Iterator[None]:
    """Say in errors which medium it was, and where it was found."""
    try:
        yield
    except SampleError as error:
        error.media, error.looked = _reported(source.ref), source.looked
        raise


def _reported(ref: object) -> str:
    text = ref if isinstance(ref, str) else repr(ref)
    return text if len(text) <= _REPORTED_CHARS else f"{text[:_REPORTED_CHARS]}... ({len(text)} characters)"
